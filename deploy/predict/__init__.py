"""Detectors on pictures, videos, cameras and addresses, and what is kept of it: `compress predict`, `Model.predict`."""

from deploy.predict.look import Seen, look
from deploy.predict.lookers import Looker, RunnerLooker, ServerLooker
from deploy.predict.outputs import KINDS, Outputs
from deploy.predict.sources import Frame, Source, open_sources

__all__ = [
    "KINDS",
    "Frame",
    "Looker",
    "Outputs",
    "RunnerLooker",
    "Seen",
    "ServerLooker",
    "Source",
    "look",
    "open_sources",
]
