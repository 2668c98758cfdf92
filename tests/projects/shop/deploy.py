"""What the project ships: the plain student from a checkpoint of the training, where kd_det is not installed."""

import sys

sys.modules["kd_det"] = None  # import kd_det fails from here on

import torch  # noqa: E402
from data import ShopMapper  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from modeling import add_shop_config  # noqa: E402

cfg = get_cfg()
add_shop_config(cfg)
cfg.merge_from_file("config.yaml")
model = build_model(cfg).eval()
weights = torch.load(sys.argv[1], weights_only=True)["model"]
model.load_state_dict(weights, strict=True)
DetectionCheckpointer(model).load(sys.argv[1])
with torch.no_grad():
    records = DatasetCatalog.get("coco_2017_val")
    output = model([ShopMapper(is_train=False)(records[0])])[0]["instances"]
print("DETECTIONS", len(output), float(output.scores.sum()))
