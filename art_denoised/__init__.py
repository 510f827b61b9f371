"""Denoising defences for image classifiers, with certificates and honest evaluation.

Public names are resolved when first used, so that ``import art_denoised`` stays cheap: ART alone
takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from art_denoised.attacks.bpda import BPDA as BPDA
    from art_denoised.attacks.pgd import PGD as PGD
    from art_denoised.checks import InputError as InputError
    from art_denoised.denoisers.architectures import DnCNN as DnCNN
    from art_denoised.denoisers.architectures import MemNet as MemNet
    from art_denoised.denoisers.architectures import UNetDenoiser as UNetDenoiser
    from art_denoised.denoisers.checkpoints import load_denoiser as load_denoiser
    from art_denoised.denoisers.checkpoints import save_denoiser as save_denoiser
    from art_denoised.denoisers.one_shot import OneShotDenoiser as OneShotDenoiser
    from art_denoised.diffusion.folders import load_diffusion as load_diffusion
    from art_denoised.diffusion.model import DiffusionModel as DiffusionModel
    from art_denoised.estimators.networks import (
        FeatureDenoisingClassifier as FeatureDenoisingClassifier,
    )
    from art_denoised.estimators.networks import RobustTrainer as RobustTrainer
    from art_denoised.estimators.rdc import (
        RobustDiffusionClassifier as RobustDiffusionClassifier,
    )
    from art_denoised.estimators.smoothing import DenoisedSmoothing as DenoisedSmoothing
    from art_denoised.evaluation.attacked.run import evaluate as evaluate
    from art_denoised.evaluation.queries import certify_queries as certify_queries
    from art_denoised.networks.activation_surgery import smooth_activations as smooth_activations
    from art_denoised.networks.activations import ParametricSoftplus as ParametricSoftplus
    from art_denoised.networks.activations import SmoothReLU as SmoothReLU
    from art_denoised.networks.activations import SplitReLU as SplitReLU
    from art_denoised.networks.activations import attacking as attacking
    from art_denoised.networks.feature_denoising import FeatureDenoising as FeatureDenoising
    from art_denoised.networks.surgery import add_feature_denoising as add_feature_denoising
    from art_denoised.rdc.classifier import DiffusionClassifier as DiffusionClassifier
    from art_denoised.rdc.likelihood import LikelihoodMaximization as LikelihoodMaximization
    from art_denoised.smoothing.blackbox import BlackBox as BlackBox
    from art_denoised.smoothing.certify import certify as certify
    from art_denoised.smoothing.certify import certify_anytime as certify_anytime
    from art_denoised.smoothing.certify import vote as vote
    from art_denoised.smoothing.modules import DenoisedClassifier as DenoisedClassifier
    from art_denoised.smoothing.modules import SmoothedClassifier as SmoothedClassifier
    from art_denoised.smoothing.statistics import Certificate as Certificate
    from art_denoised.smoothing.statistics import Vote as Vote
    from art_denoised.training.adversarial import train_robust as train_robust
    from art_denoised.training.denoiser import train_denoiser as train_denoiser
    from art_denoised.training.diffusion import train_diffusion as train_diffusion
    from art_denoised.training.plan import Plan as Plan

__version__ = "0.1.0"

_HOMES = {
    "BPDA": "attacks.bpda",
    "BlackBox": "smoothing.blackbox",
    "Certificate": "smoothing.statistics",
    "DenoisedClassifier": "smoothing.modules",
    "DenoisedSmoothing": "estimators.smoothing",
    "DiffusionClassifier": "rdc.classifier",
    "DiffusionModel": "diffusion.model",
    "DnCNN": "denoisers.architectures",
    "FeatureDenoising": "networks.feature_denoising",
    "FeatureDenoisingClassifier": "estimators.networks",
    "InputError": "checks",
    "LikelihoodMaximization": "rdc.likelihood",
    "MemNet": "denoisers.architectures",
    "OneShotDenoiser": "denoisers.one_shot",
    "PGD": "attacks.pgd",
    "ParametricSoftplus": "networks.activations",
    "Plan": "training.plan",
    "RobustDiffusionClassifier": "estimators.rdc",
    "RobustTrainer": "estimators.networks",
    "SmoothReLU": "networks.activations",
    "SmoothedClassifier": "smoothing.modules",
    "SplitReLU": "networks.activations",
    "UNetDenoiser": "denoisers.architectures",
    "Vote": "smoothing.statistics",
    "add_feature_denoising": "networks.surgery",
    "attacking": "networks.activations",
    "certify": "smoothing.certify",
    "certify_anytime": "smoothing.certify",
    "certify_queries": "evaluation.queries",
    "evaluate": "evaluation.attacked.run",
    "load_denoiser": "denoisers.checkpoints",
    "load_diffusion": "diffusion.folders",
    "save_denoiser": "denoisers.checkpoints",
    "smooth_activations": "networks.activation_surgery",
    "train_denoiser": "training.denoiser",
    "train_diffusion": "training.diffusion",
    "train_robust": "training.adversarial",
    "vote": "smoothing.certify",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'art_denoised' has no attribute {name!r}")
    return getattr(importlib.import_module(f"art_denoised.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
