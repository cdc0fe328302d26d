/**
 * Plans as one line of text: the rules of efficient_vdit_core/plan/text.py, for the page.
 *
 * A plan is {layers, uniform, dense, frames}: the pattern of each layer (pattern.js), or layers = null and one pattern for any
 * depth with the ranges that stay full, [first, last], negative from the end. frames: latent frames it was made for, or null.
 */

import { byHead, density, FULL, isFull, listHeads, patternName } from "./pattern.js";

const MAX_LAYERS = 1024;
const MAX_HEADS = 1024;
const MAX_WINDOW = 256;
const MAX_MEANS = 16;
const PART = /^(all|-?\d{1,4}|\d{1,4}-\d{1,4}):(full|\d.*|(?:\[[\d,-]+\][^[\]]+)+)$/;
const ONE = /^(?:(full)|(\d{1,4})(?::(\d{1,4}))?(?:~(\d{1,4}))?(?:\+(\d{1,4}))?)$/;
const GROUP = /\[([\d,-]+)\]([^[\]]+)/g;

/** Reads the text form. Throws an Error with {part} where it cannot. */
export function parsePlan(text) {
  const words = text.trim().split(/\s+/).filter(Boolean);
  const parts = words.map(readPart);
  const [lengths, heads] = ["frames", "heads"].map((name) => new Set(parts.map((p) => p[name]).filter(Boolean)));
  if (!parts.length || parts.length > MAX_LAYERS || lengths.size > 1 || heads.size > 1) throw unreadable(text);
  const frames = lengths.values().next().value ?? null;
  if (parts.some((p) => p.all)) {
    const [head, ...rest] = parts;
    const wrong = rest.find((p) => p.all || p.pattern !== FULL);
    if (!head.all || wrong || head.heads) throw unreadable((wrong ?? head).part);
    return { layers: null, uniform: head.pattern, dense: rest.map((p) => [p.first, p.last]), frames };
  }
  const layers = [];
  for (const p of parts) {
    for (let i = p.first; i <= p.last; i++) {
      if (i < 0 || i in layers) throw unreadable(p.part);
      layers[i] = p.pattern;
    }
  }
  for (let i = 0; i < layers.length; i++) if (!(i in layers)) throw unreadable(`${i}:?`);
  return { layers, uniform: undefined, dense: [], frames };
}

function readPart(part) {
  const match = PART.exec(part.toLowerCase());
  if (!match) throw unreadable(part);
  const [, where, written] = match;
  const pattern = { part, ...readPattern(written, part) };
  if (where === "all") return { ...pattern, all: true };
  const [first, last = first] = where.startsWith("-") ? [Number(where)] : where.split("-").map(Number);
  if (last < first || Math.max(Math.abs(first), Math.abs(last)) >= MAX_LAYERS) throw unreadable(part);
  return { ...pattern, first, last };
}

/** {pattern, frames, heads}: heads is how many, where they differ. */
function readPattern(written, part) {
  if (!written.startsWith("[")) return readOne(written, part);
  const found = [];
  let frames = null;
  for (const [, heads, name] of written.matchAll(GROUP)) {
    const one = readOne(name, part);
    if (frames && one.frames && frames !== one.frames) throw unreadable(part);
    frames ??= one.frames;
    for (const head of listHeads(heads)) {
      if (!(head < MAX_HEADS) || head in found) throw unreadable(part);
      found[head] = one.pattern;
    }
  }
  for (let head = 0; head < found.length; head++) if (!(head in found)) throw unreadable(part);
  const pattern = byHead(found);
  return { pattern, frames, heads: pattern.startsWith("[") ? found.length : null };
}

function readOne(written, part) {
  const match = ONE.exec(written);
  const [, full, k, rest, window = 0, means = 0] = match ?? [];
  if (!match || Number(window) > MAX_WINDOW || Number(means) > MAX_MEANS) throw unreadable(part);
  const more = [["~", window], ["+", means]].map(([sign, count]) => (Number(count) ? `${sign}${Number(count)}` : ""));
  return { pattern: full ?? `${Number(k)}${more.join("")}`, frames: rest === undefined ? null : Number(k) + Number(rest) };
}

function unreadable(part) {
  return Object.assign(new Error(`plan text: ${part}`), { part: part.length > 40 ? `${part.slice(0, 40)}...` : part });
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
