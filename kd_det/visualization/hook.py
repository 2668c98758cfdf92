"""Pictures of what the student learns, in TensorBoard while it trains."""

from collections.abc import Sequence

from detectron2.data import Metadata
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from torch import nn

from kd_det.random_state import preserved_random_state
from kd_det.visualization.panels import draw_row, stack
from kd_det.visualization.pictures import Viewer, attention_row, detections_row
from kd_det.visualization.view import Sample, Seen

__all__ = ["VisualizationHook"]


class VisualizationHook(HookBase):
    """
    Every ``VIS_PERIOD`` steps, a picture of each sample in Detectron2's event storage: detections and attention of the
    teacher, of the student when this process began to train and as it is now. Training is not changed by a bit.
    """

    def __init__(
        self, model: nn.Module, samples: Sequence[Sample], metadata: Metadata, *, period: int, input_format: str
    ):
        """
        Args:
            model: a Distiller or a plain detector, without DistributedDataParallel around it.
            samples: the images, few.
            metadata: of their data set.
            period: in steps.
            input_format: channel order of the samples' inputs.
        """
        self._model, self._samples, self._metadata, self._period = model, samples, metadata, period
        self._viewer = Viewer(model, input_format=input_format)
        self._before: list[dict[str, Seen]] = []

    def before_train(self):
        with preserved_random_state():
            self._before = self._look("student before")

    def after_step(self):
        if (self.trainer.iter + 1) % self._period == 0:
            with preserved_random_state():  # Detectron2's Visualizer draws colours at random
                self._draw()

    def _draw(self) -> None:
        for i, (sample, before, now) in enumerate(zip(self._samples, self._before, self._look("student"))):
            seen = {**before, **now}
            rows = [detections_row(sample, seen, self._metadata)]
            rows += [attention_row(sample, pair, maps) for pair, maps in self._viewer.maps(seen)]
            picture = stack([draw_row(row) for row in rows])[:, :, ::-1].transpose(2, 0, 1)  # RGB, channels first
            self.trainer.storage.put_image(f"distillation/image_{i}", picture.copy())

    def _look(self, student: str) -> list[dict[str, Seen]]:
        with inference_context(self._model):
            return [self._viewer(sample, student) for sample in self._samples]
