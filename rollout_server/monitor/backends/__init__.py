"""The segment monitor's arithmetic: on the device in torch (`core`), on the host compiled with numba (`host`).

Both judge with `judge`, end segments with `boundaries`, and keep their state as `rollout_server.monitor.layout` says.
"""
