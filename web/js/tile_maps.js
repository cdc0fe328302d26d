/** The T x T tile maps of a layer, one for each group of heads that are alike. */

import { make } from "./elements.js";
import { density, FULL, headGroups, isFull, patternName, referenceFrames, tileKinds } from "./pattern.js";

export const percent = (share) => `${Math.round(100 * share)} %`;

/**
 * The maps of a layer's pattern; where heads of the plan differ, each with its name and its heads below it.
 * @param {string} pattern of the layer
 * @param {number} frames latent frames
 * @param {number} places how many maps to leave room for, so that the chart keeps its height; 1: no heads of the plan differ
 * @param {(key: string, values?: object) => string} say the texts in the user's language
 */
export function tileMaps(pattern, frames, places, say) {
  const maps = headGroups(pattern).map((group) => {
    const name = isFull(group.pattern, frames) ? say("full") : patternName(group.pattern, frames);
    const share = `${name}, ${percent(density(group.pattern, frames))}`;
    const heads = headsText(group, say);
    const map = drawTiles(group.pattern, frames);
    map.setAttribute("aria-label", `${heads}: ${share}. ${referenceText(group.pattern, frames, say)}`);
    const caption = places > 1 ? [make("b", {}, share), make("span", {}, heads)] : [];
    return make("figure", { title: places > 1 ? heads : undefined }, map, ...caption);
  });
  while (maps.length < places) maps.push(emptyPlace(frames));
  return maps;
}

function headsText({ count, heads }, say) {
  return heads ? say(count === 1 ? "head" : "heads", { heads: heads.replaceAll(",", ", ") }) : say("allHeads");
}

function referenceText(pattern, frames, say) {
  return isFull(pattern, frames) ? "" : say("referenceText", { frames: referenceFrames(pattern, frames).join(", ") || "-" });
}

function emptyPlace(frames) {
  const map = make("svg", { class: "tiles", viewBox: `0 0 ${frames} ${frames}` });
  return make("figure", { class: "empty", "aria-hidden": "true" }, map, make("b", {}, FULL), make("span", {}, FULL));
}

/** Row = the frame that asks, column = the frame it sees. Where tiles touch, those of a kind that follow one another are one piece. */
function drawTiles(pattern, frames) {
  const gap = frames > 48 ? 0 : 0.12;
  const kind = tileKinds(pattern, frames);
  const found = { skipped: "", reference: "", own: "", mean: "" };
  for (let row = 0; row < frames; row++) {
    const kinds = Array.from({ length: frames }, (_, column) => kind(row, column));
    for (let start = 0, end = 1; start < frames; start = end, end++) {
      while (!gap && kinds[end] === kinds[start]) end++;
      found[kinds[start]] += `M${start} ${row}h${end - start - gap}v${1 - gap}h-${end - start - gap}z`;
    }
  }
  const paths = Object.entries(found).map(([name, d]) => make("path", { class: name, d }));
  return make("svg", { class: "tiles", role: "img", viewBox: `0 0 ${frames} ${frames}` }, ...paths);
}
