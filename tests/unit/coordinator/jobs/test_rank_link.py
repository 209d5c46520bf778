"""The link to rank 0: whoever is silent is lost, whoever was not listened to is not."""

import asyncio
import time

import pytest
import zmq.asyncio

from apollo_tp.coordinator.jobs.rank_link import RankLink
from tests.support.fakes import FakeRanks

TIMEOUT_SECONDS = 0.5


@pytest.mark.parametrize("mute", [False, True])
def test_a_busy_coordinator_does_not_count_rank_zero_as_lost(tmp_path, mute):
    """What has arrived meanwhile is read first; then silence counts again."""

    async def main():
        context = zmq.asyncio.Context()
        link = RankLink(context, tmp_path / "ranks.sock", timeout_seconds=TIMEOUT_SECONDS, on_change=lambda: None)
        link.attach(on_hello=lambda _: None, on_orphan_reply=lambda _: None, require_identify=lambda: False)
        task = asyncio.create_task(link.run())
        try:
            with FakeRanks(tmp_path / "ranks.sock", tmp_path / "journal") as ranks:
                await asyncio.wait_for(link.ready(), 10)
                ranks.mute = mute
                for _ in range(2):
                    time.sleep(2 * TIMEOUT_SECONDS)  # noqa: ASYNC251 - the loop is busy with something else
                    for _ in range(20):
                        await asyncio.sleep(0)
                        assert link.connected
                await asyncio.sleep(2 * TIMEOUT_SECONDS)
                assert link.connected is not mute
        finally:
            task.cancel()
            await asyncio.wait([task])
            context.destroy(0)

    asyncio.run(main())
