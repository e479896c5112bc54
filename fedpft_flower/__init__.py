"""Federated Proxy Fine-Tuning (FedPFT, Peng et al., IJCAI 2024) as a Flower app.

The server owns the full foundation model (FM). Clients receive a sub-FM: every layer
and its attention whole, the least important neurons of every feed-forward network
(FFN) cut away. They train an adapter (LoRA on attention, and the task head) on it.
LoRA sits on attention, attention is whole in the sub-FM, so adapters have the same
names and shapes on both sides: plugging an adapter into the FM is a load.

One word per thing: FM, sub-FM, neuron (one hidden unit of an FFN: a row of each `up`
projection with its bias, and a column of `down`), selection (how neurons are scored),
planner (how they are chosen by their scores), plan (the layers and neurons that the
sub-FM keeps), adapter (the trained tensors by name), plug-in (loading the adapter into
the FM), refinement (adjusting it there), package (what a client needs of the sub-FM),
install (delivering it to a node), store (the sub-FMs on a node's disk), activity (how
often a neuron fires: what is measured is how often it does not), objective (what models
do: classify, generate), ledger (bytes by round, direction and kind). A node is a
SuperNode, or a virtual one; a client is a node that trains; a site is a node's name.

Shapes: B batch, T tokens, D hidden, N neurons, K kept neurons, L layers, C classes.
"""

__version__ = "0.1.0"
