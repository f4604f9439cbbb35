"""torchvision's FCOS and Faster R-CNN detectors in JAX/Flax: the same answers, convertible both ways."""

from flaxdet import convert, data, ops, train
from flaxdet._version import __version__
from flaxdet.evaluation.evaluate import coco_results, evaluate
from flaxdet.files.hub import load_pretrained, save_pretrained
from flaxdet.files.models import load, load_categories, save
from flaxdet.files.variables import load_variables, save_variables
from flaxdet.images.transform import to_original, transform, transform_targets
from flaxdet.inference.export import export
from flaxdet.inference.exported import load_exported
from flaxdet.inference.predict import predict
from flaxdet.inference.predictor import Predictor
from flaxdet.models import FCOS, FasterRCNN
from flaxdet.models.classes import match_classes, replace_classes
from flaxdet.models.folding import fold_batch_norm
from flaxdet.ops import AnchorGenerator
from flaxdet.results.bridges import to_supervision
from flaxdet.results.draw import draw_detections
from flaxdet.structures import Detections, ImageBatch, Proposals, Targets, TransformConfig
from flaxdet.xla.options import compiler_options
from flaxdet.zoo import _tiny as _tiny
from flaxdet.zoo.fasterrcnn_resnet50_fpn import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from flaxdet.zoo.fasterrcnn_resnet50_fpn_v2 import FasterRCNN_ResNet50_FPN_V2_Weights, fasterrcnn_resnet50_fpn_v2
from flaxdet.zoo.fcos_resnet50_fpn import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn
from flaxdet.zoo.weights import ResNet50_Weights

__all__ = [
    "FCOS",
    "AnchorGenerator",
    "Detections",
    "FCOS_ResNet50_FPN_Weights",
    "FasterRCNN",
    "FasterRCNN_ResNet50_FPN_V2_Weights",
    "FasterRCNN_ResNet50_FPN_Weights",
    "ImageBatch",
    "Predictor",
    "Proposals",
    "ResNet50_Weights",
    "Targets",
    "TransformConfig",
    "__version__",
    "coco_results",
    "compiler_options",
    "convert",
    "data",
    "draw_detections",
    "evaluate",
    "export",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "fold_batch_norm",
    "load",
    "load_categories",
    "load_exported",
    "load_pretrained",
    "load_variables",
    "match_classes",
    "ops",
    "predict",
    "replace_classes",
    "save",
    "save_pretrained",
    "save_variables",
    "to_original",
    "to_supervision",
    "train",
    "transform",
    "transform_targets",
]
