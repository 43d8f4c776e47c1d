"""Tensor parallelism: how parameters are sharded, and the layers that compute on the shards."""
