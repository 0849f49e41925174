"""Copies of the model: one interface for an engine in this process and for Ray actors, and pools of them.

`pool` stands in front of `replica`, the protocol that `local` and `ray_actor` implement. May import
`rollout_server.engine` and `rollout_server.weights`, and never HTTP.
"""
