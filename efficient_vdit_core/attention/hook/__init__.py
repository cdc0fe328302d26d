"""A running model's attention made sparse: prepared before a forward, decided call by call.

A forward in the order of its calls:

1. Who runs the model describes the forward in a `state.ForwardState`: where the video's tokens stand (``layout``), whether
   sparsity is on at this step (``reason`` is empty), how its layers are counted.
2. `prepare.Preparation.before_forward` settles it: what each layer does (`prepare.LayerWork`: a pattern, or why it stays
   dense), which backend computes its calls (`backend_choices`), and what becomes of the cached residual (`residual`).
3. Each attention call of the model reaches the override that `override.attention_override` made, as an
   `attention_call.AttentionCall`. `reasons.why_not_the_video` tells calls over the video from others, such as
   cross-attention, and the state's `CallCounter` says which layer a call is of.
4. The override looks up what was settled, takes off the text's padding (`padding`), computes by `tile_attention` and gives
   the padding back; or it asks for the dense attention that the call came with. Either is counted in the report, with the
   reason.

The words: a *call* is one of attention functions; its *place* is layer, visit and first head; *dense* is attention as the
model asked for it, with other nodes' overrides; *settled* is a forward whose backends were chosen before it; *renewed* is the
share of sparse calls that compute dense attention as well, for the residual; *work* is what a layer does.
"""
