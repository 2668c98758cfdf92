"""The weights of torchvision's detectors in Detectron2's: paired in order, classes and anchors rearranged."""

from collections.abc import Iterator, Sequence

import torch
from detectron2.data import MetadataCatalog
from torch import Tensor, nn

from kd_det.weights.convert import convert_resnet

__all__ = ["COCO_LABELS", "copy_detector_weights", "kept_labels"]

# torchvision's COCO detectors have an output for each of COCO's ids, 80 of 1 to 90, and one for the background, 0.
COCO_LABELS = 91


def kept_labels(num_labels: int) -> list[int]:
    """The outputs of torchvision that are Detectron2's classes 0, 1, ...; of COCO's 91 the 80 that COCO uses."""
    if num_labels != COCO_LABELS:
        return list(range(1, num_labels))
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    return sorted(ids, key=ids.get)


@torch.no_grad()
def copy_detector_weights(source: nn.Module, target: nn.Module) -> None:
    """
    Copy the weights of a detector of torchvision into its counterpart of Detectron2, as
    :func:`kd_det.teachers.torchvision_detectors.configure_torchvision_detector` describes it, in place.
    """
    _copy_backbone(source.backbone, target.backbone)
    if hasattr(target, "head"):
        _copy_dense_head(source.head, target.head, source.anchor_generator)
    else:
        _copy_rpn_head(source.rpn.head, target.proposal_generator.rpn_head, source.rpn.anchor_generator)
        _copy_roi_heads(source.roi_heads, target.roi_heads)


def _copy_backbone(source: nn.Module, target: nn.Module) -> None:
    _copy_resnet(source.body, target.bottom_up)
    # Detectron2 lists them from the coarsest level to the finest.
    _copy(source.fpn.inner_blocks, nn.ModuleList(target.lateral_convs[::-1]))
    _copy(source.fpn.layer_blocks, nn.ModuleList(target.output_convs[::-1]))
    _copy(source.fpn.extra_blocks, target.top_block)


def _copy_resnet(source: nn.Module, target: nn.Module) -> None:
    eps = target.stem.conv1.norm.eps
    state = dict(source.state_dict())
    for name, module in source.named_modules():
        if hasattr(module, "running_var"):
            state[f"{name}.running_var"] = _variance_with_eps(module, eps)
    target.load_state_dict(convert_resnet(state))


def _variance_with_eps(norm: nn.Module, eps: float) -> Tensor:
    """The variance that a norm with this eps needs to be equal; torchvision's published detectors have an eps of 0."""
    return norm.running_var + (norm.eps - eps)


def _copy_rpn_head(source: nn.Module, target: nn.Module, anchors: nn.Module) -> None:
    order = _anchor_order(anchors)
    _copy(source.conv, target.conv)
    _copy(source.cls_logits, target.objectness_logits, order)
    _copy(source.bbox_pred, target.anchor_deltas, _rows(order, 4))


def _copy_roi_heads(source: nn.Module, target: nn.Module) -> None:
    labels = kept_labels(source.box_predictor.cls_score.out_features)
    _copy(source.box_head, target.box_head)
    _copy(source.box_predictor.cls_score, target.box_predictor.cls_score, [*labels, 0])
    _copy(source.box_predictor.bbox_pred, target.box_predictor.bbox_pred, _rows(labels, 4))
    if target.mask_on:
        *body, predictor = _leaves(target.mask_head)
        _copy(nn.ModuleList([source.mask_head, source.mask_predictor.conv5_mask]), nn.ModuleList(body))
        _copy(source.mask_predictor.mask_fcn_logits, predictor, labels)
    if target.keypoint_on:
        _copy(nn.ModuleList([source.keypoint_head, source.keypoint_predictor]), target.keypoint_head)


def _copy_dense_head(source: nn.Module, target: nn.Module, anchors: nn.Module) -> None:
    classification, regression = source.classification_head, source.regression_head
    order, num_labels = _anchor_order(anchors), classification.num_classes
    labels = kept_labels(num_labels)
    _copy(classification.conv, target.cls_subnet)
    _copy(regression.conv, target.bbox_subnet)
    scores = [anchor * num_labels + label for anchor in order for label in labels]
    _copy(classification.cls_logits, target.cls_score, scores)
    _copy(regression.bbox_reg, target.bbox_pred, _rows(order, 4))
    if hasattr(regression, "bbox_ctrness"):
        _copy(regression.bbox_ctrness, target.ctrness)


def _anchor_order(anchors: nn.Module) -> list[int]:
    """Where torchvision has the anchors of a cell, in Detectron2's order; its own has the sizes inside the ratios."""
    num_sizes, num_ratios = len(anchors.sizes[0]), len(anchors.aspect_ratios[0])
    return torch.arange(num_ratios * num_sizes).view(num_ratios, num_sizes).T.flatten().tolist()


def _rows(items: Sequence[int], each: int) -> list[int]:
    return [each * item + i for item in items for i in range(each)]


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters or buffers of their own, in order; Detectron2's convolutions hold their norm."""
    for child in module.modules():
        if [*child.parameters(recurse=False), *child.buffers(recurse=False)]:
            yield child


def _copy(source: nn.Module, target: nn.Module, rows: Sequence[int] | None = None) -> None:
    """
    Copy module by module; with rows, only these outputs.

    Raises:
        ValueError: another number of modules, or other names or shapes of their weights.
    """
    for one, other in zip(_leaves(source), _leaves(target), strict=True):
        state: dict[str, Tensor] = {k: v if rows is None else v[rows] for k, v in _own_state(one).items()}
        own = _own_state(other)
        if "running_var" in state:
            state["running_var"] = _variance_with_eps(one, other.eps)
        if "bias" in own and "bias" not in state:  # RetinaNetHead's convolutions have a bias before a norm too
            state["bias"] = torch.zeros_like(own["bias"])
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise ValueError(f"the weights of {type(one).__name__} do not fit those of Detectron2's counterpart")
        for name, value in state.items():
            own[name].copy_(value)


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
