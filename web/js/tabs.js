/**
 * The page's tabs: which is open, and which queued a prompt. A run's events come whatever tab is open by then. The id of a graph
 * names no tab, because a copy may have the same one.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Recent } from "./recent.js";

const NUMBER = Symbol("efficient_vdit.tab"); // kept in the page's object of a workflow, which Vue hands out plain and wrapped
const prompts = new Recent(); // by prompt id, what `queued` gives
let count = 0;
let loading = null; // the number of the tab whose graph is being built: the page names it as the open one only afterwards
let answers = Promise.resolve(); // to all requests to queue a prompt

function numberOf(workflow) {
  if (!workflow) return 0;
  return (workflow[NUMBER] ??= ++count);
}

/** The number of the open tab; 0 where the page has none. */
export const openTab = () => loading ?? numberOf(app.extensionManager.workflow?.activeWorkflow);

/** A node of the open tab, whichever object it is by now. */
export const placeOf = (node) => JSON.stringify([openTab(), node.graph?.id, node.id]);

/** Whether all nodes of the open tab are there. */
export const isLoaded = () => loading === null;

/** Of a prompt, the number of the tab that queued it and what was kept of it; the open one for a prompt of before this page was loaded. */
export async function queued(promptId) {
  await answers; // an event may overtake the answer that names its prompt
  return prompts.get(promptId) ?? { tab: openTab() };
}

/** Follow the page from now on. Calls `loaded` after each graph that it loads, and keeps what `keep` gives when a prompt is queued. */
export function followTabs(loaded, keep) {
  const { loadGraphData } = app;
  app.loadGraphData = async function (...values) {
    const workflow = values[3]; // of a tab that exists; a name or nothing for a new one
    const own = (loading = typeof workflow === "object" && workflow ? numberOf(workflow) : ++count);
    try {
      return await loadGraphData.apply(this, values);
    } finally {
      if (loading === own) loading = null;
      loaded();
    }
  };
  const { queuePrompt } = api;
  api.queuePrompt = function (...values) {
    const prompt = { tab: openTab() };
    try {
      prompt.kept = keep();
    } catch (error) {
      console.error("Efficient-vDiT", error); // of a picture; the prompt is queued all the same
    }
    const answer = queuePrompt.apply(this, values);
    const known = answer.then(({ prompt_id }) => prompts.set(prompt_id, prompt));
    answers = Promise.allSettled([answers, known]).then(() => {}); // what they gave would be kept, each within the next
    return answer;
  };
}
