/** A run's events wait here until the tab that queued it is open: only then do the nodes that they are for exist. */

import { isLoaded, openTab, placeOf, queued } from "./tabs.js";

const waiting = new Map(); // what runs of tabs that are not open told: {tab, promptId, acts} by tab, event and node

/**
 * Does `act` once the tab that queued the prompt is open, with what each chart was by then; the same event of a later prompt of
 * that tab takes its place.
 */
export async function inItsTab({ prompt_id: promptId, node }, event, act) {
  const { tab, kept } = await queued(promptId);
  const key = JSON.stringify([tab, event, node]);
  const before = waiting.get(key);
  const acts = before && before.promptId === promptId ? before.acts : [];
  waiting.delete(key); // the later one goes to the end
  const whenQueued = (chart) => kept?.get(placeOf(chart.node)) ?? chart.current();
  waiting.set(key, { tab, promptId, acts: [...acts, () => act(whenQueued)] });
  actInOpenTab();
}

/** What waits for the open tab, once all its nodes are there. */
export function actInOpenTab() {
  if (!isLoaded()) return;
  const due = [...waiting].filter(([, { tab }]) => tab === openTab());
  for (const [key, { acts }] of due) {
    waiting.delete(key);
    for (const act of acts) act();
  }
}
