/**
 * Plans as one line of text and the tiles they keep: the rules of efficient_vdit_core/plan.py and tiles.py, for the page.
 *
 * A plan is {layers, uniform, dense, frames}: k of each layer, or layers = null and one k for any depth with the ranges that
 * stay full, [first, last], negative from the end. k = null is full attention. frames: latent frames it was made for, or null.
 */

const MAX_LAYERS = 1024;
const PART = /^(all|-?\d{1,4}|\d{1,4}-\d{1,4}):(?:(full)|(\d{1,4})(?::(\d{1,4}))?)$/;

/** Reads the text form. Throws an Error with {part} where it cannot. */
export function parsePlan(text) {
  const words = text.trim().split(/\s+/).filter(Boolean);
  const parts = words.map(readPart);
  const lengths = new Set(parts.map((p) => p.frames).filter(Boolean));
  if (!parts.length || parts.length > MAX_LAYERS || lengths.size > 1) throw unreadable(text);
  const frames = lengths.values().next().value ?? null;
  if (parts.some((p) => p.all)) {
    const [head, ...rest] = parts;
    const wrong = rest.find((p) => p.all || p.k !== null);
    if (!head.all || wrong) throw unreadable((wrong ?? head).part);
    return { layers: null, uniform: head.k, dense: rest.map((p) => [p.first, p.last]), frames };
  }
  const layers = [];
  for (const p of parts) {
    for (let i = p.first; i <= p.last; i++) {
      if (i < 0 || i in layers) throw unreadable(p.part);
      layers[i] = p.k;
    }
  }
  for (let i = 0; i < layers.length; i++) if (!(i in layers)) throw unreadable(`${i}:?`);
  return { layers, uniform: undefined, dense: [], frames };
}

function readPart(part) {
  const match = PART.exec(part.toLowerCase());
  if (!match) throw unreadable(part);
  const [, where, full, k, rest] = match;
  const pattern = { part, k: full ? null : Number(k), frames: rest === undefined ? null : Number(k) + Number(rest) };
  if (where === "all") return { ...pattern, all: true };
  const [first, last = first] = where.startsWith("-") ? [Number(where)] : where.split("-").map(Number);
  if (last < first || Math.max(Math.abs(first), Math.abs(last)) >= MAX_LAYERS) throw unreadable(part);
  return { ...pattern, first, last };
}

function unreadable(part) {
  return Object.assign(new Error(`plan text: ${part}`), { part: part.length > 40 ? `${part.slice(0, 40)}...` : part });
}

/** The text form of a plan; parsePlan's inverse. */
export function formatPlan({ layers, uniform, dense, frames }) {
  const name = (k) => (frames ? patternName(k, frames) : k === null ? "full" : String(k));
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

/** k of one layer in a model of `depth` layers. */
export function layerPattern(plan, layer, depth) {
  if (plan.layers) return plan.layers[layer];
  return plan.dense.some(([first, last]) => covers(first, last, layer, depth)) ? null : plan.uniform;
}

function covers(first, last, layer, depth) {
  const [low, high] = [first, last].map((i) => (i < 0 ? i + depth : i));
  return low <= layer && layer <= high;
}

/** Whether nothing is left out of `frames` latent frames. */
export const isFull = (k, frames) => k === null || frames - k <= 1;

/** The paper's name, such as 2:6 for 8 frames. */
export const patternName = (k, frames) => (isFull(k, frames) ? "full" : `${k}:${frames - k}`);

/** Indices of the reference frames, evenly spread. */
export function referenceFrames(k, frames) {
  const all = [...Array(frames).keys()];
  if (isFull(k, frames)) return all;
  if (!k) return [];
  const strided = all.filter((i) => i % Math.ceil(frames / k) === 0);
  return strided.length === k ? strided : all.slice(0, k).map((i) => Math.floor((i * frames) / k));
}

/** Share of the frame x frame tiles that is computed, 0 to 1. */
export function density(k, frames) {
  const rest = frames - referenceFrames(k, frames).length;
  return 1 - (rest * Math.max(rest - 1, 0)) / frames ** 2;
}

/** A copy in which one layer has the next pattern: full, then ever sparser, then full again. */
export function cycleLayer(plan, layer, depth, frames, backwards = false) {
  if (!plan.layers) return { ...plan, dense: toggleDense(plan, layer, depth) };
  const sparse = plan.layers.filter((k) => !isFull(k, frames));
  for (let k = 1; !isFull(k, frames); k *= 2) sparse.push(k);
  const choices = [null, ...[...new Set(sparse)].sort((a, b) => b - a)];
  const now = isFull(plan.layers[layer], frames) ? 0 : choices.indexOf(plan.layers[layer]);
  const next = choices[(now + (backwards ? choices.length - 1 : 1)) % choices.length];
  return { ...plan, layers: plan.layers.with(layer, next), frames };
}

function toggleDense({ dense }, layer, depth) {
  const [inside, outside] = [true, false].map((yes) => dense.filter(([a, b]) => covers(a, b, layer, depth) === yes));
  if (!inside.length) return [...dense, [layer, layer]];
  const pieces = inside.filter(([first]) => first >= 0).flatMap(([a, b]) => [[a, layer - 1], [layer + 1, b]]);
  return [...outside, ...pieces.filter(([a, b]) => a <= b)];
}

/** The same plan with every layer of a model of `depth` layers written out. */
export function writeOut(plan, depth, frames) {
  return { layers: [...Array(depth).keys()].map((i) => layerPattern(plan, i, depth)), uniform: undefined, dense: [], frames };
}
