// What the chart says of the patterns of a plan together: which there are, in how many layers, and a name for a person.

import { density, headCount, headGroups, isFull, once, patternName } from "./pattern.js";

/** The name for a person: "5 × 1:7~1, 3 × full" where heads differ. */
export const readableName = once((pattern, frames) => {
  const groups = headGroups(pattern);
  if (groups.length === 1) return patternName(pattern, frames);
  return groups.map((group) => `${group.count} × ${patternName(group.pattern, frames)}`).join(", ");
});

/** How many layers follow each pattern, by its name; some heads of a layer count as a part of it. */
export function layersByName(patterns, frames) {
  const layers = new Map();
  for (const pattern of patterns) layers.set(pattern, (layers.get(pattern) ?? 0) + 1);
  const found = new Map();
  for (const [pattern, count] of layers) {
    const groups = headGroups(pattern);
    const heads = headCount(groups);
    for (const group of groups) {
      const name = patternName(group.pattern, frames);
      found.set(name, (found.get(name) ?? 0) + (count * group.count) / heads);
    }
  }
  return found;
}

/** The sparse patterns of all heads, the densest first. */
export function sparsePatterns(patterns, frames) {
  const every = new Set([...new Set(patterns)].flatMap((pattern) => headGroups(pattern).map((group) => group.pattern)));
  const sparse = [...every].filter((pattern) => !isFull(pattern, frames));
  const shares = new Map(sparse.map((pattern) => [pattern, density(pattern, frames)]));
  return sparse.sort((a, b) => shares.get(b) - shares.get(a));
}
