/**
 * The tiles that a pattern keeps: the rules of efficient_vdit_core/tiles.py and head_patterns.py, for the page.
 *
 * A pattern is its short name: "full", "2" (k reference frames), "2~1" (and neighbours up to 1 frame away), "2~1+1" (and 1
 * mean frame), or one for each group of heads, "[0-3,7]2~1[4-6]full".
 */

import { Recent } from "./recent.js";

export const FULL = "full";
const GROUP = /\[([\d,-]+)\]([^[]+)/g;

/**
 * A rule of a pattern and what else decides, applied once to each: a draw asks the same in every bar. Of so many the latest are
 * kept, lest a page that stays open for days grows.
 */
export function once(rule, most = 5000) {
  const known = Object.assign(new Recent(), { most });
  return (...about) => {
    const key = about.join(" ");
    if (!known.has(key)) known.set(key, rule(...about));
    return known.get(key);
  };
}

/** The groups of heads that are alike: how many, which as text, and their pattern. One group where all heads are. */
export const headGroups = once((pattern) => {
  if (!pattern.startsWith("[")) return [{ count: 1, heads: "", pattern }];
  return [...pattern.matchAll(GROUP)].map(([, heads, alike]) => ({ count: [...listHeads(heads)].length, heads, pattern: alike }));
});

/** How many heads the groups have together. */
export const headCount = (groups) => groups.reduce((sum, { count }) => sum + count, 0);

/** The heads that "0-3,7" names, one by one, as a text may name far too many; those of parts that cannot be read are NaN. */
export function* listHeads(text) {
  for (const part of text.split(",")) {
    const [, first, last = first] = /^(\d{1,4})(?:-(\d{1,4}))?$/.exec(part) ?? [];
    if (!(Number(first) <= Number(last))) yield NaN;
    for (let head = Number(first); head <= Number(last); head++) yield head;
  }
}

/** The pattern of heads from one for each: plain where all are alike. */
export function byHead(patterns) {
  const groups = new Map();
  for (const [head, kind] of patterns.entries()) groups.set(kind, groups.get(kind) ?? []).get(kind).push(head);
  if (groups.size === 1) return patterns[0];
  return [...groups].map(([kind, heads]) => `[${joinHeads(heads)}]${kind}`).join("");
}

function joinHeads(heads) {
  const every = new Set(heads);
  const starts = heads.filter((head) => !every.has(head - 1));
  const ends = heads.filter((head) => !every.has(head + 1));
  return starts.map((start, i) => (start === ends[i] ? `${start}` : `${start}-${ends[i]}`)).join(",");
}

function numbers(pattern) {
  const [, k, window = 0, means = 0] = /^(\d+)(?:~(\d+))?(?:\+(\d+))?$/.exec(pattern).map((part) => part && Number(part));
  return { k, window, means };
}

/** Whether nothing is left out of `frames` latent frames. */
export const isFull = once((pattern, frames) => headGroups(pattern).every((group) => isFullOne(group.pattern, frames)));

const isFullOne = once((pattern, frames) => {
  if (pattern === FULL) return true;
  const { k, window, means } = numbers(pattern);
  if (frames - k <= 1) return true;
  // The first of the others has as many behind it as its window at most, and one of each stretch.
  if (frames - k > 1 + window + means) return false;
  const others = otherFrames(k, frames);
  if (!means) return others.at(-1) - others[0] <= window;
  const stretches = others.map((frame) => Math.floor(frame / stretchOf(means, frames)));
  return windows(others, window).every(([low, high]) => {
    const unseen = [...stretches.slice(0, low), ...stretches.slice(high)];
    return new Set(unseen).size === unseen.length;
  });
});

/** Frames in a stretch of time that is averaged; the last may be shorter. */
const stretchOf = (means, frames) => Math.ceil(frames / means);

/** Of each of the frames that are no reference frames, where in their list those that it sees begin and end. */
function windows(others, window) {
  let [low, high] = [0, 0];
  return others.map((frame) => {
    while (others[low] < frame - window) low++;
    while (others[high] <= frame + window) high++;
    return [low, high];
  });
}

/** How many means all frames see together. */
function meanTiles({ window, means }, others, frames) {
  if (!means) return 0;
  const places = others.map((frame) => Math.floor(frame / stretchOf(means, frames)));
  const starts = [...places.keys()].filter((i) => places[i] !== places[i - 1]); // of each stretch, in the list
  const ends = [...starts.slice(1), others.length];
  let count = 0;
  for (const [low, high] of windows(others, window)) {
    for (let i = 0; i < starts.length; i++) if (starts[i] < low || ends[i] > high) count++;
  }
  return count;
}

/** The name for that many frames, such as 2:6 or 2:6~1 for 8; of each group where heads differ, as in the text form. */
export const patternName = once((pattern, frames) => {
  const groups = headGroups(pattern);
  if (groups.length === 1) return nameOne(groups[0].pattern, frames);
  const names = []; // of each head: patterns that differ may be one at this length
  for (const group of groups) {
    const name = nameOne(group.pattern, frames);
    for (const head of listHeads(group.heads)) names[head] = name;
  }
  return byHead(names);
});

function nameOne(pattern, frames) {
  if (isFull(pattern, frames)) return FULL;
  const { k, window, means } = numbers(pattern);
  return `${k}:${frames - k}${window ? `~${window}` : ""}${means ? `+${means}` : ""}`;
}

function placedFrames(k, frames) {
  if (!k) return [];
  const all = [...Array(frames).keys()];
  const strided = all.filter((i) => i % Math.ceil(frames / k) === 0);
  return strided.length === k ? strided : all.slice(0, k).map((i) => Math.floor((i * frames) / k));
}

function otherFrames(k, frames) {
  const placed = new Set(placedFrames(k, frames));
  return [...Array(frames).keys()].filter((i) => !placed.has(i));
}

/** Indices of the reference frames, evenly spread, of heads that are alike. */
export function referenceFrames(pattern, frames) {
  return isFull(pattern, frames) ? [...Array(frames).keys()] : placedFrames(numbers(pattern).k, frames);
}

/** What heads that are alike do with the tile of two frames: "reference", "own" (its window too), "mean" or "skipped". */
export function tileKinds(pattern, frames) {
  const references = Array(frames).fill(false);
  for (const frame of referenceFrames(pattern, frames)) references[frame] = true;
  const { window, means } = pattern === FULL ? { window: 0, means: 0 } : numbers(pattern);
  return (row, column) => {
    if (references[row] || references[column]) return "reference";
    if (Math.abs(row - column) <= window) return "own";
    return means ? "mean" : "skipped";
  };
}

/** Share of the frame x frame tiles that is computed, 0 to 1, a mean over heads. */
export const density = once((pattern, frames) => {
  const groups = headGroups(pattern);
  return groups.reduce((sum, group) => sum + group.count * densityOne(group.pattern, frames), 0) / headCount(groups);
});

const densityOne = once((pattern, frames) => {
  if (isFull(pattern, frames)) return 1;
  const { k, window, means } = numbers(pattern);
  const others = otherFrames(k, frames);
  let kept = frames ** 2 - others.length ** 2 + meanTiles({ window, means }, others, frames);
  for (const [low, high] of windows(others, window)) kept += high - low;
  return kept / frames ** 2;
});
