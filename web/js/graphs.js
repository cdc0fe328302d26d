/** The workflow that is open: its nodes, in subgraphs too, and what an input's value comes from. */

import { app } from "../../../scripts/app.js";

const rootGraph = () => app.rootGraph ?? app.graph;

/** The node of an execution id; "1:2:3" is node 3 in the subgraph 2 in the subgraph 1. */
export function findNode(executionId) {
  let graph = rootGraph();
  let node;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}

/** All nodes, in subgraphs too. */
export function* allNodes(graph = rootGraph()) {
  for (const node of graph.nodes) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

/**
 * The nodes that the value of a link comes from, into subgraphs and out of them, the nearest first, each with those of its
 * widgets that count: {node, widgets}. Looks behind no node for which `ends` holds.
 */
export function* behind(graph, linkId, ends = () => false, seen = new Set()) {
  const link = graph?.getLink(linkId);
  if (!link || seen.has(link)) return;
  seen.add(link);
  const { origin_id: id, origin_slot: slot } = link;
  const node = graph.getNodeById(id);
  if (node?.subgraph) {
    for (const inner of node.subgraph.outputs[slot]?.linkIds ?? []) yield* behind(node.subgraph, inner, ends, seen);
  } else if (node) {
    yield { node, widgets: node.widgets ?? [] };
    if (!ends(node)) for (const input of node.inputs ?? []) yield* behind(graph, input.link, ends, seen);
  } else {
    for (const outer of allNodes()) if (outer.subgraph === graph) yield* behindInput(outer, outer.inputs[slot], ends, seen);
  }
}

/** What an input of a subgraph is given from outside, where the subgraph stands as `node`: a link's value or its widget's. */
function* behindInput(node, input, ends, seen) {
  if (input?.link == null) yield { node, widgets: node.widgets?.filter(({ name }) => name === input?.widget?.name) ?? [] };
  else yield* behind(node.graph, input.link, ends, seen);
}
