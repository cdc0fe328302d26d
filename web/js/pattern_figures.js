// What the chart says of the patterns of a plan together: which there are, in how many layers, and a name for a person.

import { density, headCount, headGroups, isFull, patternName } from "./pattern.js";

/** The name for a person: "5 × 1:7~1, 3 × full" where heads differ. */
export function readableName(pattern, frames) {
  const groups = headGroups(pattern);
  if (groups.length === 1) return patternName(pattern, frames);
  return groups.map((group) => `${group.count} × ${patternName(group.pattern, frames)}`).join(", ");
}

/** How many layers follow each pattern, by its name; some heads of a layer count as a part of it. */
export function layersByName(patterns, frames) {
  const found = new Map();
  for (const pattern of patterns) {
    const groups = headGroups(pattern);
    const heads = headCount(groups);
    for (const group of groups) {
      const name = patternName(group.pattern, frames);
      found.set(name, (found.get(name) ?? 0) + group.count / heads);
    }
  }
  return found;
}

/** The sparse patterns of all heads, the densest first. */
export function sparsePatterns(patterns, frames) {
  const every = new Set(patterns.flatMap((pattern) => headGroups(pattern).map((group) => group.pattern)));
  const sparse = [...every].filter((pattern) => !isFull(pattern, frames));
  return sparse.sort((a, b) => density(b, frames) - density(a, frames));
}
