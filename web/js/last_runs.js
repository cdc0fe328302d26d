/** What the runs told of each Sparse Attention node, and whether such a run is the last one or an earlier one by now. */

import { allNodes, behind, findNode } from "./graphs.js";
import { Recent } from "./recent.js";
import { openTab } from "./tabs.js";

const SPARSE = "EVDiTSparseAttention";
const GIVES_MODEL = ["MODEL", "GUIDER"];
const SAMPLED = ["LATENT", "IMAGE", "VIDEO"];
const latest = new Recent(); // by tab and execution id: the prompt that last sampled with the node, or as if it were not there

const keyOf = (node) => JSON.stringify([openTab(), String(node)]);

/** A report has come; its tab is open. */
export const noteReport = ({ node, prompt_id: prompt }) => latest.set(keyOf(node), prompt);

/** Whether nothing was sampled in the place of the run that a report is of. */
export const isLast = ({ node, prompt_id: prompt }) => latest.get(keyOf(node)) === prompt;

/** `reports` with one more: beside those of other nodes, and of the same node in the same prompt, which had several samplers. */
export function withReport(reports, report) {
  const stays = ({ node, prompt_id: prompt }) => String(node) !== String(report.node) || (prompt && prompt === report.prompt_id);
  return [...reports.filter(stays), report];
}

/** Those of the last run; those of an earlier one where there are none. */
export function lastOf(reports) {
  const last = reports.filter(isLast);
  return last.length ? last : reports;
}

/**
 * A prompt that the open tab queued has ended, in which the nodes of these ids ran. Where a sampler ran, what a Sparse Attention node
 * told before is of an earlier run if the sampler's model comes from that node, which told nothing now (it is bypassed), or no
 * sampler's does any more. What came from the cache is as it was.
 */
export function promptEnded(prompt, ids) {
  const samplers = ids.map(findNode).filter((node) => node && samples(node));
  if (!samplers.length) return;
  const sampled = new Set(samplers.flatMap(sparseBehind));
  const inUse = new Set([...allNodes()].filter(samples).flatMap(sparseBehind));
  for (const key of [...latest.keys()]) {
    const [tab, id] = JSON.parse(key);
    const node = findNode(id);
    if (tab === openTab() && (sampled.has(node) || !inUse.has(node))) latest.set(key, prompt);
  }
}

/** Whether a node samples: it has a model and gives what was made with it. Our own tile map makes no clip. */
function samples({ comfyClass, inputs = [], outputs = [] }) {
  const has = (slots, types) => slots.some(({ type }) => types.includes(type));
  return has(inputs, GIVES_MODEL) && has(outputs, SAMPLED) && !comfyClass?.startsWith("EVDiT");
}

/** The Sparse Attention nodes that a sampler's model comes through, bypassed ones too; not those of a stage before it. */
function sparseBehind({ graph, inputs }) {
  const links = inputs.filter(({ type }) => GIVES_MODEL.includes(type)).map(({ link }) => link);
  const ends = ({ outputs = [] }) => outputs.some(({ type }) => SAMPLED.includes(type));
  const nodes = links.flatMap((link) => [...behind(graph, link, ends)]).map(({ node }) => node);
  return nodes.filter(({ comfyClass }) => comfyClass === SPARSE);
}
