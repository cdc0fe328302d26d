/**
 * Plans as one line of text: the rules of efficient_vdit_core/plan/text.py, for the page.
 *
 * A plan is {layers, uniform, dense, frames}: the pattern of each layer (pattern.js), or layers = null and one pattern for any
 * depth with the ranges that stay full, [first, last], negative from the end. frames: latent frames it was made for, or null.
 */

import { byHead, density, FULL, isFull, listHeads, patternName } from "./pattern.js";

const MAX_LAYERS = 1024;
const MAX_HEADS = 1024;
const MAX_FRAMES = 1024;
const MAX_WINDOW = 256;
const MAX_MEANS = 16;
const SIGNED = "-[1-9]\\d{0,3}|\\d{1,4}"; // counts below 0 are read to be named
const PART = /^(all|-?\d{1,4}|\d{1,4}-\d{1,4}):(full|\d.*|(?:\[[\d,-]+\][^[\]]+)+)$/;
const ONE = new RegExp(`^(?:(full)|(\\d{1,4})(?::(\\d{1,4}))?(?:~(${SIGNED}))?(?:\\+(${SIGNED}))?)$`);
const SPACE = /[\s\x1c-\x1f\x85]+/; // what Python and JavaScript take for space
const GROUP = /\[([\d,-]+)\]([^[\]]+)/g;

/** Reads the text form. Throws an Error with {why, values} where it cannot: a text of locales/<language>/main.json. */
export function parsePlan(text) {
  const words = text.split(SPACE).filter(Boolean);
  if (!words.length || words.length > MAX_LAYERS) throw wrong("unreadable", { part: text });
  const parts = words.map(readPart);
  const frames = onlyNumber(parts.map((p) => p.frames), "twoLengths");
  return { frames, ...(parts.some((p) => p.all) ? readUniform(parts) : readLayers(parts)) };
}

/** Why a text is no plan. */
function wrong(why, { part, ...values } = {}) {
  const short = part?.length > 40 ? `${part.slice(0, 40)}...` : part;
  return Object.assign(new Error(`plan text: ${why}`), { why, values: { part: short, ...values } });
}

/** The one number that is said, or null; two are wrong. */
function onlyNumber(said, why) {
  const [first, second] = [...new Set(said.filter(Boolean))].sort((a, b) => a - b);
  if (second) throw wrong(why, { first, second });
  return first ?? null;
}

function readUniform([head, ...rest]) {
  if (!head.all || rest.some((p) => p.all || p.pattern !== FULL)) throw wrong("allFirst");
  if (head.heads) throw wrong("allAlike", { part: head.part });
  return { layers: null, uniform: head.pattern, dense: rest.map((p) => [p.first, p.last]) };
}

function readLayers(parts) {
  const layers = [];
  for (const { part, pattern, first, last } of parts) {
    if (first < 0) throw wrong("fromTheEnd", { part });
    for (let layer = first; layer <= last; layer++) {
      if (layer in layers) throw wrong("layerTwice", { part, layer });
      layers[layer] = pattern;
    }
  }
  const layer = layers.findIndex((pattern) => !pattern);
  if (layer >= 0) throw wrong("leavesOutLayer", { layer, last: layers.length - 1 });
  onlyNumber(parts.map((p) => p.heads), "twoHeadCounts");
  return { layers, uniform: undefined, dense: [] };
}

function readPart(part) {
  const match = PART.exec(part.toLowerCase());
  if (!match) throw wrong("unreadable", { part });
  const [, where, written] = match;
  const pattern = { part, ...readPattern(written, part) };
  if (where === "all") return { ...pattern, all: true };
  const [first, last = first] = where.startsWith("-") ? [Number(where)] : where.split("-").map(Number);
  const most = MAX_LAYERS - 1;
  if (last < first || Math.max(Math.abs(first), Math.abs(last)) > most) throw wrong("layersAscend", { part, most });
  return { ...pattern, first, last };
}

/** {pattern, frames, heads}: heads is how many, where they differ. */
function readPattern(written, part) {
  if (!written.startsWith("[")) return readOne(written, part);
  const found = [];
  const lengths = [];
  for (const [, heads, name] of written.matchAll(GROUP)) {
    const one = readOne(name, part);
    lengths.push(one.frames);
    for (const head of listHeads(heads)) {
      if (!(head < MAX_HEADS)) throw wrong("unreadable", { part });
      if (head in found) throw wrong("headTwice", { part, head });
      found[head] = one.pattern;
    }
  }
  const head = found.findIndex((pattern) => !pattern);
  if (head >= 0) throw wrong("leavesOutHead", { part, head });
  const frames = onlyNumber(lengths, "twoLengths");
  const pattern = byHead(found);
  return { pattern, frames, heads: pattern.startsWith("[") ? found.length : null };
}

function readOne(written, part) {
  const match = ONE.exec(written);
  if (!match) throw wrong("unreadable", { part });
  const [, full, k, rest] = match;
  const [window, means] = [match[4], match[5]].map((count) => Number(count ?? 0));
  if (window < 0 || window > MAX_WINDOW) throw wrong("windowRange", { part, count: window, most: MAX_WINDOW });
  if (means < 0 || means > MAX_MEANS) throw wrong("meansRange", { part, count: means, most: MAX_MEANS });
  const frames = rest === undefined ? null : Number(k) + Number(rest);
  if (Math.max(Number(k ?? 0), frames) > MAX_FRAMES) throw wrong("tooManyFrames", { part, most: MAX_FRAMES });
  return { pattern: full ?? `${Number(k)}${window ? `~${window}` : ""}${means ? `+${means}` : ""}`, frames };
}

/** The text form of a plan; parsePlan's inverse. */
export function formatPlan({ layers, uniform, dense, frames }) {
  const name = (pattern) => (frames ? patternName(pattern, frames) : pattern);
  const range = (first, last) => (first === last ? `${first}` : `${first}-${last}`);
  if (!layers) return [`all:${name(uniform)}`, ...dense.map(([first, last]) => `${range(first, last)}:full`)].join(" ");
  const parts = [];
  for (let start = 0, i = 1; i <= layers.length; i++) {
    if (i < layers.length && name(layers[i]) === name(layers[start])) continue;
    parts.push(`${range(start, i - 1)}:${name(layers[start])}`);
    start = i;
  }
  return parts.join(" ");
}

/** The pattern of one layer in a model of `depth` layers. */
export function layerPattern(plan, layer, depth) {
  if (plan.layers) return plan.layers[layer];
  return plan.dense.some(([first, last]) => covers(first, last, layer, depth)) ? FULL : plan.uniform;
}

function covers(first, last, layer, depth) {
  const [low, high] = [first, last].map((i) => (i < 0 ? i + depth : i));
  return low <= layer && layer <= high;
}

/** A copy in which one layer has the next pattern: full, then ever sparser at `frames` latent frames, then full again. */
export function cycleLayer(plan, layer, depth, frames, backwards = false) {
  if (!plan.layers) return { ...plan, dense: toggleDense(plan, layer, depth) };
  const sparse = plan.layers.filter((pattern) => !isFull(pattern, frames));
  for (let k = 1; !isFull(`${k}`, frames); k *= 2) sparse.push(`${k}`);
  const choices = [FULL, ...[...new Set(sparse)].sort((a, b) => density(b, frames) - density(a, frames))];
  const now = isFull(plan.layers[layer], frames) ? 0 : choices.indexOf(plan.layers[layer]);
  const next = choices[(now + (backwards ? choices.length - 1 : 1)) % choices.length];
  return { ...plan, layers: plan.layers.with(layer, next) };
}

function toggleDense({ dense }, layer, depth) {
  const [inside, outside] = [true, false].map((yes) => dense.filter(([a, b]) => covers(a, b, layer, depth) === yes));
  if (!inside.length) return [...dense, [layer, layer]];
  const pieces = inside.filter(([first]) => first >= 0).flatMap(([a, b]) => [[a, layer - 1], [layer + 1, b]]);
  return [...outside, ...pieces.filter(([a, b]) => a <= b)];
}

/** The same plan with every layer of a model of `depth` layers written out. */
export function writeOut(plan, depth) {
  return { ...plan, layers: [...Array(depth).keys()].map((i) => layerPattern(plan, i, depth)), uniform: undefined, dense: [] };
}
