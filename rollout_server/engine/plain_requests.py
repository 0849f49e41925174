"""Plain requests to vLLM, which the monitor does not follow, up to logits that are not finite."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from vllm import RequestOutput, SamplingParams
from vllm.inputs import TokensInput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from common.weights import NonFiniteLogits
from rollout_server.monitor.records import NonFiniteRecord


class PlainRequests:
    """Those of one engine. `finish`: the sentinel that the worker forces a request to whose logits are not finite."""

    def __init__(self, llm: AsyncLLM, finish: int) -> None:
        self._llm = llm
        self._finish = finish
        self._broken_by: dict[int, int | None] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def outputs(self, uid: int, prompt: TokensInput, params: SamplingParams) -> AsyncIterator[RequestOutput]:
        """What vLLM puts out for a request whose `extra_args` hold `uid`.

        A request may sample the sentinel on its own account too: the worker knows which it was.

        Raises:
            NonFiniteLogits: with the version of the weights.
        """
        self._broken_by[uid] = None
        try:
            async with aclosing(self._llm.generate(prompt, params, _name(uid))) as outputs:
                async for output in outputs:
                    if self._finish in output.outputs[0].token_ids:
                        await self._check(uid)
                    elif (version := self._broken_by[uid]) is not None:
                        raise NonFiniteLogits(version)
                    yield output
        except (NonFiniteLogits, EngineDeadError):
            raise
        except Exception:
            # A grammar, for example, refuses the sentinel.
            await self._check(uid)
            raise
        finally:
            del self._broken_by[uid]

    async def _check(self, uid: int) -> None:
        versions: list[int | None] = await self._llm.collective_rpc("e3rl_non_finite", args=(uid,))
        if versions[0] is not None:
            raise NonFiniteLogits(versions[0])

    def deliver(self, record: NonFiniteRecord) -> bool:
        """End the request that the record is of, which would go on to no use; whether it is one of these."""
        if record.uid not in self._broken_by:
            return False
        self._broken_by[record.uid] = record.version
        ending = asyncio.create_task(self._llm.abort(_name(record.uid)))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        return True


def _name(uid: int) -> str:
    """What vLLM calls the request."""
    return f"plain-{uid}"
