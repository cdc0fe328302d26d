/** The T x T tile maps of a layer, one for each group of heads that are alike. */

import { make } from "./elements.js";
import { density, FULL, headGroups, isFull, once, patternName, referenceFrames, tileKinds } from "./pattern.js";

export const MOST_MAPS = 16; // of a layer
const MOST_PIECES = 30_000; // of a map that shows each tile
const COARSE = 127; // rows of one that does not; an odd number, which does not follow the distance of the reference frames

export const percent = (share) => `${Math.round(100 * share)} %`;

/**
 * The maps of a layer's pattern; where heads of the plan differ, each with its name and its heads below it. Of many groups of heads
 * the first have one, and a line tells how many more there are.
 * @param {string} pattern of the layer
 * @param {number} frames latent frames
 * @param {number} places how many maps to leave room for, so that the chart keeps its height; 1: no heads of the plan differ
 * @param {(key: string, values?: object) => string} say the texts in the user's language
 */
export function tileMaps(pattern, frames, places, say) {
  const groups = headGroups(pattern);
  const maps = groups.slice(0, MOST_MAPS).map((group) => {
    const name = isFull(group.pattern, frames) ? say("full") : patternName(group.pattern, frames);
    const share = `${name}, ${percent(density(group.pattern, frames))}`;
    const heads = headsText(group, say);
    const map = drawTiles(group.pattern, frames);
    map.setAttribute("aria-label", `${heads}: ${share}. ${referenceText(group.pattern, frames, say)}`);
    const caption = places > 1 ? [make("b", {}, share), make("span", {}, heads)] : [];
    return make("figure", { title: places > 1 ? heads : undefined }, map, ...caption);
  });
  const more = groups.length - maps.length;
  if (more) maps.push(make("figure", {}, make("span", {}, say("moreGroups", { count: more }))));
  while (maps.length < Math.min(places, MOST_MAPS + 1)) maps.push(emptyPlace(frames));
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

/** Row = the frame that asks, column = the frame it sees. */
function drawTiles(pattern, frames) {
  const { size, pieces } = tilePieces(pattern, frames);
  const paths = Object.entries(pieces).map(([name, d]) => make("path", { class: name, d }));
  return make("svg", { class: "tiles", role: "img", viewBox: `0 0 ${size} ${size}` }, ...paths);
}

/**
 * The rows of a map and, by kind, the path of its tiles. Where tiles touch, those of a kind that follow one another are one piece;
 * a map that is many pieces all the same shows evenly spread rows and columns alone.
 */
const tilePieces = once((pattern, frames) => {
  const every = isFull(pattern, frames) ? 1 : 2 * referenceFrames(pattern, frames).length + 3; // in a row, at most
  const size = frames > COARSE && frames * every > MOST_PIECES ? COARSE : frames;
  const gap = size > 48 ? 0 : 0.12;
  const kind = tileKinds(pattern, frames);
  const shown = Array.from({ length: size }, (_, i) => Math.floor((i * frames) / size));
  const pieces = { skipped: "", reference: "", own: "", mean: "" };
  for (const [row, asks] of shown.entries()) {
    for (let start = 0, end = 1; start < size; start = end, end++) {
      const name = kind(asks, shown[start]);
      while (!gap && end < size && kind(asks, shown[end]) === name) end++;
      pieces[name] += `M${start} ${row}h${end - start - gap}v${1 - gap}h-${end - start - gap}z`;
    }
  }
  return { size, pieces };
}, 64);
