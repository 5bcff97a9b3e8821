"""The models that describe a cache, for users: the plan, a shard's receipt, the manifest."""

from distillcache.schemas.format.manifest import Manifest, Plan, ShardReceipt

__all__ = ["Manifest", "Plan", "ShardReceipt"]
