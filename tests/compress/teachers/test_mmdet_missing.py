"""Without mmdet its teachers are one clear line. (With it: tests/parity_mmdet.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from compress.config.teacher import Mmdet, Source
from compress.teachers.load import open_teacher
from deploy.core.errors import UserError


@pytest.mark.parametrize("missing", ["mmdet", "mmcv"])
def test_what_is_missing_is_said(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # importing it fails, installed or not
    source = Source(mmdet=Mmdet(config=tmp_path / "a.py", checkpoint=tmp_path / "a.pth"))
    with pytest.raises(UserError, match=r"teacher\.mmdet needs mmdet 3 and mmcv 2 .*docs/mmdet\.md") as caught:
        open_teacher(source, torch.device("cpu"))
    assert "\n" not in str(caught.value)
