"""Keys of torchvision's state_dicts that tell detectors of one family apart."""

from __future__ import annotations

# of a ResNet-50, and of a deeper body
RESNET50 = frozenset({"backbone.body.layer4.2.conv3.weight", "backbone.body.layer3.5.conv3.weight"})
DEEPER_BODY = frozenset({"backbone.body.layer3.6.conv3.weight"})

# of Faster R-CNN with box_predictor, and of the branches that Mask R-CNN and Keypoint R-CNN have besides
FASTER_RCNN = frozenset({"rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"})
OTHER_BRANCHES = frozenset(
    {"roi_heads.mask_predictor.mask_fcn_logits.weight", "roi_heads.keypoint_predictor.kps_score_lowres.weight"}
)
OTHER_FASTER_RCNN = (FASTER_RCNN, "a Faster R-CNN with other parts than torchvision's builders on a ResNet-50-FPN")
