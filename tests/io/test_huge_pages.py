"""Large blocks come in huge pages: one page fault for 2 MiB in place of 512."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
BLOCK_MIB = 256
JOB = f"""
import resource
import recompile
import torch
torch.zeros(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = torch.empty({BLOCK_MIB} << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """Page faults of a process that fills a block of memory."""
    words = [sys.executable, "-c", JOB]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="no huge pages on request")
def test_a_large_block_costs_few_page_faults_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = BLOCK_MIB * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults(THP_MEM_ALLOC_ENABLE="0") > pages // 2
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert faults() < pages // 2
