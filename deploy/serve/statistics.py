"""The protocol's statistics extension: counts and durations of each model since the server started.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Duration:
    """How often something was measured, and how long it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds

    def to_dict(self) -> dict[str, int]:
        """As the extension writes it, in nanoseconds."""
        return {"count": self.count, "ns": round(1e9 * self.seconds)}


@dataclass
class ModelStatistics:
    """A model's share; of requests for pictures and for tensors alike."""

    last_inference_s: float = 0.0
    """Time of the last answer, seconds since the epoch."""
    images: int = 0
    """Images that were answered."""
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    """Requests with another answer, or whose client left."""
    queue: Duration = field(default_factory=Duration)
    decode: Duration = field(default_factory=Duration)
    inference: Duration = field(default_factory=Duration)
    """Of requests: the call of the runtime that each rode in."""
    draw: Duration = field(default_factory=Duration)
    calls: dict[int, Duration] = field(default_factory=dict)
    """Calls of the runtime that succeeded, by their number of images."""

    def answered(self, images: int, seconds: Mapping[str, float]) -> None:
        """Count a request. seconds: of the stages that it had, and `total`."""
        self.last_inference_s = time.time()
        self.images += images
        self.success.add(seconds["total"])
        self.queue.add(seconds["queue"])
        self.decode.add(seconds.get("decode", 0.0))
        self.inference.add(seconds["inference"])
        self.draw.add(seconds.get("draw", 0.0))

    def called(self, batch: int, seconds: float) -> None:
        """Count a call of the runtime."""
        self.calls.setdefault(batch, Duration()).add(seconds)

    def to_dict(self, name: str, version: str) -> dict[str, Any]:
        """An entry of `model_stats`. Preparing an input is decoding a picture, extracting an output is drawing it; the
        runtime is not asked how long copies take."""
        return {
            "name": name,
            "version": version,
            "last_inference": round(1e3 * self.last_inference_s),
            "inference_count": self.images,
            "execution_count": sum(calls.count for calls in self.calls.values()),
            "inference_stats": {
                "success": self.success.to_dict(),
                "fail": self.fail.to_dict(),
                "queue": self.queue.to_dict(),
                "compute_input": self.decode.to_dict(),
                "compute_infer": self.inference.to_dict(),
                "compute_output": self.draw.to_dict(),
                "cache_hit": Duration().to_dict(),
                "cache_miss": Duration().to_dict(),
            },
            "batch_stats": [
                {
                    "batch_size": batch,
                    "compute_input": Duration(calls.count).to_dict(),
                    "compute_infer": calls.to_dict(),
                    "compute_output": Duration(calls.count).to_dict(),
                }
                for batch, calls in sorted(self.calls.items())
            ],
            "memory_usage": [],
        }
