"""The loop of a GPU: a whole training step captured once as a CUDA graph, and replayed.

A step of these models is several hundred kernels of a few microseconds each, and Python takes longer to launch them
than the GPU to run them. Everything that changes from step to step lies on the device: the order of the examples, the
number of the step, which picks the batch and the learning rate, and the sum of the losses. So an epoch is one replay
after another, and one number read at its end.

All batches have the same size: what the last one lacks is filled with examples that ask nothing, which leaves mean loss
and gradients as they are.

B batch, P questions of an example
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lrm_recall.train.batches import IGNORE, Split, Splits, batches, padded
from lrm_recall.train.device import replays, turn
from lrm_recall.train.learner import Learner, Logits
from lrm_recall.train.optimise import FitSettings
from lrm_recall.train.plain import questions

_WARM_UP = 3  # runs before a capture: kernels are compiled and tuned, workspaces and optimiser states allocated


class CaptureError(RuntimeError):
    """The model does something that a CUDA graph cannot hold, such as reading a number back from the device."""


class Recorder:
    """Captures pieces of work as graphs that share memory: they run one after another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work a few times, then capture it; a function that does it again.

        Raises:
            CaptureError: it cannot be captured.
        """
        for _ in range(_WARM_UP):
            work()
        torch.cuda.current_stream().synchronize()
        with replays.closed():
            graph, problem = _capture(work, self._pool)
            if problem is not None:
                self._settle()
                if isinstance(problem, torch.OutOfMemoryError):
                    raise problem
                raise CaptureError(" ".join(f"{type(problem).__name__}: {problem}".split())[:300]) from problem
        self._graphs.append(graph)

        def replay() -> None:
            with replays.passing():
                graph.replay()

        return replay

    def _settle(self) -> None:
        """Capture something harmless: torch's random state takes part in a failed capture until another ends well."""
        number = torch.zeros(1, device="cuda")
        _capture(lambda: number.add_(1), torch.cuda.graph_pool_handle())

    def close(self) -> None:
        """Give the memory of all graphs back; they cannot be replayed any more."""
        with replays.closed():
            for graph in self._graphs:
                graph.reset()


def _capture(
    work: Callable[[], None], pool: tuple[int, int]
) -> tuple[torch.cuda.CUDAGraph, Exception | None]:
    """The work as a graph, and what went wrong. Not by torch.cuda.graph, which waits for all other threads' work."""
    graph, problem = torch.cuda.CUDAGraph(), None
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        work()
    except Exception as error:  # it has run before, so whatever this is comes from being captured
        problem = error
    try:
        graph.capture_end()
    except RuntimeError as error:
        problem = problem or error  # the first says more
    return graph, problem


class GraphLoop:
    """Training and scoring by replay; as PlainLoop but for the order of sums.

    Args:
        settings, model, splits, logits: as for `lrm_recall.train.loop.fit`. The model's parameters must stay where
            they are as long as the loop is in use.
        recorder: what captures.

    Raises:
        CaptureError: the model cannot be captured; it is as it was.
    """

    def __init__(
        self, settings: FitSettings, model: nn.Module, splits: Splits, logits: Logits, recorder: Recorder | None = None
    ) -> None:
        device = splits.train.inputs.device
        self._num_train = len(splits.train.inputs)
        self._order = torch.Generator().manual_seed(settings.seed)
        B = min(settings.batch_size, self._num_train)
        self._train = padded(splits.train, B)
        self._steps = len(self._train.inputs) // B  # of an epoch
        total = settings.max_epochs * self._steps

        # What a step reads: the batches of this epoch, how many examples of each are real, the rate at every step
        self._rows = torch.arange(self._steps * B, device=device).view(self._steps, B)
        self._sizes = (self._rows < self._num_train).sum(1)  # [steps]
        rates = [settings.rate(step / total) for step in range(total)]
        self._rates = torch.tensor(rates + _WARM_UP * rates[-1:], device=device)  # a run may be shorter than a warm-up
        # What it changes, beside the model
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._rate = torch.zeros((), device=device)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._learner = Learner(settings, model, logits, self._rate)

        self._recorder = recorder or Recorder()
        with turn(settings.precision):
            with restored(model, self._learner, self._step):
                self._train_step = self._recorder.record(self._descend)
            shapes = {split.answers.shape[1]: split for split in (splits.valid, splits.test)}
            self._scorers = {P: _Scorer(self._learner, padded(split, B).rows(self._rows[0]), self._recorder)
                             for P, split in shapes.items()}

    def epoch(self) -> float:
        """Train on every example once; the mean loss."""
        shuffled = torch.randperm(self._num_train, generator=self._order)
        self._rows.view(-1)[: self._num_train].copy_(shuffled)
        self._loss_sum.zero_()
        for _ in range(self._steps):
            self._train_step()
        increment_version(self._learner.parameters())  # a replay changes them without autograd's knowledge
        return self._loss_sum.item() / self._num_train

    def predict(self, split: Split) -> tuple[Tensor, float]:
        """Predicted answers [N, P] int64 to the valid or the test split, and the mean loss of a question."""
        predictions, loss_sum = self._scorers[split.answers.shape[1]].score(split)
        return predictions, loss_sum / questions(split)

    def close(self) -> None:
        """Give the graphs' memory back; the loop is of no use any more."""
        self._recorder.close()

    def _descend(self) -> None:
        """The step that is captured: nothing here depends on the host."""
        step = self._step % self._steps  # [1], of this epoch
        batch = self._train.rows(self._rows.index_select(0, step).squeeze(0))
        self._rate.copy_(self._rates.index_select(0, self._step).squeeze(0))
        loss = self._learner.descend(batch)
        self._loss_sum.add_(loss * self._sizes.index_select(0, step).squeeze(0))
        self._step.add_(1)


class _Scorer:
    """Answers to batches of one shape, by replay; `example` is such a batch."""

    def __init__(self, learner: Learner, example: Split, recorder: Recorder) -> None:
        self._learner, self._batch = learner, example
        self._predictions = torch.empty_like(example.answers)  # [B, P]
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=example.answers.device)
        self._replay = recorder.record(self._answer)

    def score(self, split: Split) -> tuple[Tensor, float]:
        """Predicted answers [N, P] int64, and the sum of the losses."""
        self._loss_sum.zero_()
        predictions = []
        for batch in batches(padded(split, len(self._batch.inputs)), len(self._batch.inputs)):
            for mine, theirs in zip(self._batch, batch, strict=True):
                mine.copy_(theirs)
            self._replay()
            predictions.append(self._predictions.clone())
        return torch.cat(predictions)[: len(split.inputs)], self._loss_sum.item()

    @torch.no_grad()
    def _answer(self) -> None:
        increment_version(self._learner.parameters())  # so that no layer answers with what it has kept of them
        logits = self._learner.answer(self._batch)  # [B * P, V]
        self._predictions.copy_(logits.argmax(dim=-1).view_as(self._predictions))
        answers = self._batch.answers.flatten()
        self._loss_sum.add_(F.cross_entropy(logits, answers, reduction="sum", ignore_index=IGNORE))


@contextlib.contextmanager
def restored(model: nn.Module, learner: Learner, step: Tensor) -> Iterator[None]:
    """Whatever is trained inside leaves no trace: parameters, the optimiser's states, the step, random numbers."""
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    device = step.device
    random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), saved, strict=True):
                parameter.copy_(value)
            learner.renew()
            for state in learner.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
            step.zero_()
        if random is not None:
            torch.cuda.set_rng_state(random, device)
