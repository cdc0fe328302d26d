// What the chart says of the patterns of a plan: their shares, names and order.

import { density, headCount, headGroups, isFull, patternName } from "./pattern.js";

/**
 * What a chart says of patterns at one number of latent frames. A count goes over all T x T tiles and a draw asks for the same
 * few patterns in every bar, so that each is counted once.
 */
export class PatternFigures {
  constructor(frames) {
    this.frames = frames;
    this.known = new Map(); // by the pattern of heads that are alike
  }

  /** {full, density, name} of heads that are alike. */
  alike(pattern) {
    if (!this.known.has(pattern)) {
      const [full, share, name] = [isFull, density, patternName].map((rule) => rule(pattern, this.frames));
      this.known.set(pattern, { full, density: share, name });
    }
    return this.known.get(pattern);
  }

  /** Whether no head of a layer leaves anything out. */
  isFull(pattern) {
    return headGroups(pattern).every((group) => this.alike(group.pattern).full);
  }

  /** The share of a layer's tiles that is computed, a mean over its heads. */
  density(pattern) {
    const groups = headGroups(pattern);
    return groups.reduce((sum, group) => sum + group.count * this.alike(group.pattern).density, 0) / headCount(groups);
  }

  /** The name for a person: "5 × 1:7~1, 3 × full" where heads differ. */
  readableName(pattern) {
    const groups = headGroups(pattern);
    if (groups.length === 1) return this.alike(pattern).name;
    return groups.map((group) => `${group.count} × ${this.alike(group.pattern).name}`).join(", ");
  }

  /** How many layers follow each pattern, by its name; some heads of a layer count as a part of it. */
  layersByName(patterns) {
    const found = new Map();
    for (const pattern of patterns) {
      const groups = headGroups(pattern);
      const heads = headCount(groups);
      for (const group of groups) {
        const { name } = this.alike(group.pattern);
        found.set(name, (found.get(name) ?? 0) + group.count / heads);
      }
    }
    return found;
  }

  /** The sparse patterns of all heads, the densest first. */
  sparsePatterns(patterns) {
    const every = new Set(patterns.flatMap((pattern) => headGroups(pattern).map((group) => group.pattern)));
    const sparse = [...every].filter((pattern) => !this.alike(pattern).full);
    return sparse.sort((a, b) => this.alike(b).density - this.alike(a).density);
  }
}
