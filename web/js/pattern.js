/**
 * The tiles that a pattern keeps: the rules of efficient_vdit_core/tiles.py and head_patterns.py, for the page.
 *
 * A pattern is its short name: "full", "2" (k reference frames), "2~1" (and neighbours up to 1 frame away), "2~1+1" (and 1
 * mean frame), or one for each group of heads, "[0-3,7]2~1[4-6]full".
 */

export const FULL = "full";
const GROUP = /\[([\d,-]+)\]([^[]+)/g;

/** The groups of heads that are alike: how many, which as text, and their pattern. One group where all heads are. */
export function headGroups(pattern) {
  if (!pattern.startsWith("[")) return [{ count: 1, heads: "", pattern }];
  return [...pattern.matchAll(GROUP)].map(([, heads, alike]) => ({ count: listHeads(heads).length, heads, pattern: alike }));
}

/** How many heads the groups have together. */
export const headCount = (groups) => groups.reduce((sum, { count }) => sum + count, 0);

/** The heads that "0-3,7" names; those of parts that cannot be read are NaN. */
export function listHeads(text) {
  return text.split(",").flatMap((part) => {
    const [, first, last = first] = /^(\d{1,4})(?:-(\d{1,4}))?$/.exec(part) ?? [];
    const count = Number(last) - Number(first) + 1;
    return count > 0 ? [...Array(count).keys()].map((i) => Number(first) + i) : [NaN];
  });
}

/** The pattern of heads from one for each: plain where all are alike. */
export function byHead(patterns) {
  const kinds = [...new Set(patterns)];
  if (kinds.length === 1) return kinds[0];
  const headsOf = (kind) => [...patterns.keys()].filter((head) => patterns[head] === kind);
  return kinds.map((kind) => `[${joinHeads(headsOf(kind))}]${kind}`).join("");
}

function joinHeads(heads) {
  const starts = heads.filter((head) => !heads.includes(head - 1));
  const ends = heads.filter((head) => !heads.includes(head + 1));
  return starts.map((start, i) => (start === ends[i] ? `${start}` : `${start}-${ends[i]}`)).join(",");
}

function numbers(pattern) {
  const [, k, window = 0, means = 0] = /^(\d+)(?:~(\d+))?(?:\+(\d+))?$/.exec(pattern).map((part) => part && Number(part));
  return { k, window, means };
}

/** A rule of a pattern and a number of frames, applied once to each: it takes T x T steps, and a draw asks the same in every bar. */
function once(rule) {
  const known = new Map();
  return (pattern, frames) => {
    const key = `${pattern} ${frames}`;
    if (!known.has(key)) known.set(key, rule(pattern, frames));
    return known.get(key);
  };
}

/** Whether nothing is left out of `frames` latent frames. */
export const isFull = (pattern, frames) => headGroups(pattern).every((group) => isFullOne(group.pattern, frames));

const isFullOne = once((pattern, frames) => {
  if (pattern === FULL) return true;
  const { k, window, means } = numbers(pattern);
  if (frames - k <= 1) return true;
  if (means) return averaged(pattern, frames).every((row) => row.every((count) => count <= 1));
  const others = otherFrames(k, frames);
  return window > 0 && others.at(-1) - others[0] <= window;
});

/** For each frame that is no reference frame, how many unseen frames each stretch of time has: a mean of so many. */
function averaged(pattern, frames) {
  const { k, window, means } = numbers(pattern);
  const others = otherFrames(k, frames);
  const stretch = Math.ceil(frames / means);
  return others.map((frame) => {
    const counts = Array(Math.ceil(frames / stretch)).fill(0);
    for (const other of others) if (Math.abs(other - frame) > window) counts[Math.floor(other / stretch)]++;
    return counts.filter(Boolean);
  });
}

/** The name for that many frames, such as 2:6 or 2:6~1 for 8; of each group where heads differ, as in the text form. */
export function patternName(pattern, frames) {
  const groups = headGroups(pattern);
  if (groups.length === 1) return nameOne(groups[0].pattern, frames);
  const names = []; // of each head: patterns that differ may be one at this length
  for (const group of groups) for (const head of listHeads(group.heads)) names[head] = nameOne(group.pattern, frames);
  return byHead(names);
}

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
  const references = new Set(referenceFrames(pattern, frames));
  const { window, means } = pattern === FULL ? { window: 0, means: 0 } : numbers(pattern);
  return (row, column) => {
    if (references.has(row) || references.has(column)) return "reference";
    if (Math.abs(row - column) <= window) return "own";
    return means ? "mean" : "skipped";
  };
}

/** Share of the frame x frame tiles that is computed, 0 to 1, a mean over heads. */
export function density(pattern, frames) {
  const groups = headGroups(pattern);
  return groups.reduce((sum, group) => sum + group.count * densityOne(group.pattern, frames), 0) / headCount(groups);
}

const densityOne = once((pattern, frames) => {
  if (isFull(pattern, frames)) return 1;
  const kind = tileKinds(pattern, frames);
  let kept = numbers(pattern).means ? averaged(pattern, frames).flat().length : 0;
  for (let row = 0; row < frames; row++) {
    for (let column = 0; column < frames; column++) kept += ["reference", "own"].includes(kind(row, column));
  }
  return kept / frames ** 2;
});
