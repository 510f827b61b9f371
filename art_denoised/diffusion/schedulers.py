"""Scheduler configurations of diffusers, read as preconditionings.

A scheduler says how a network was trained (its noise schedule and what it predicts) and how to draw
samples from it. Only the training matters here, except where an option of sampling changes the
estimate x0 itself. Each key is therefore read, known not to change x0, or refused by name.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, get_args

from art_denoised.checks import InputError, one_line
from art_denoised.diffusion.preconditioning import DDPM, EDM, Flow, Preconditioning, Prediction

_CONFIG = "scheduler_config.json"
# fmt: off
VARIANCE_PRESERVING = (
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler",
    "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
VARIANCE_EXPLODING = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
_CONSISTENCY = (
    "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler", "LCMScheduler", "TCDScheduler",
)

_SCHEDULE = (
    "beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "rescale_betas_zero_snr",
    "trained_betas",
)
_READ = {*_SCHEDULE, "predict_epsilon", "prediction_type", "sigma_data", "sigma_max", "sigma_min"}
_CHECKED = {
    "clip_sample", "clip_sample_range", "invert_sigmas", "thresholding", "timestep_type",
    "use_flow_sigmas",
}
# These choose the levels, the order and the noise of sampling; x0 at a level is the same.
_SAMPLING = {
    "algorithm_type", "base_image_seq_len", "base_shift", "corrector_order",
    "disable_corrector", "dynamic_thresholding_ratio", "eta", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped",
    "lower_order_final", "max_image_seq_len", "max_shift", "noise_sampler_seed", "predict_x0",
    "predictor_order", "rho", "sample_max_value", "set_alpha_to_one", "shift", "shift_terminal",
    "sigma_schedule", "skip_prk_steps", "solver_order", "solver_p", "solver_type",
    "steps_offset", "stochastic_sampling", "tau_func", "time_shift_type", "timestep_spacing",
    "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas",
    "use_lu_lambdas", "variance_type",
}
# fmt: on
KNOWN_KEYS = frozenset(_READ | _CHECKED | _SAMPLING)


def find_scheduler(folder: Path) -> Path | None:
    """Return the scheduler_config.json of a pipeline or of a single folder, if there is one."""
    places = (folder / "scheduler", folder)
    return next((p for place in places if (p := place / _CONFIG).is_file()), None)


def read_preconditioning(folder: Path) -> Preconditioning:
    """Return the preconditioning that a folder's scheduler_config.json describes.

    Clipping of samples to [-1, 1] (``clip_sample``) is not applied: the result stays differentiable
    and `OneShotDenoiser` clips anyway.
    """
    path = find_scheduler(folder)
    if path is None:
        raise InputError(
            f"{folder} holds no scheduler_config.json; save the scheduler of the training there"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        name = str(config.get("_class_name", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    try:
        return _preconditioning(path, name, config)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {one_line(error)}") from None


def _preconditioning(path: Path, name: str, config: dict[str, Any]) -> Preconditioning:
    if name in _CONSISTENCY:
        raise InputError(
            f"{path} is of a consistency model ({name}), which jumps to one possible image and not "
            "to the mean of all; give a diffusion model"
        )
    if name not in (*VARIANCE_PRESERVING, *FLOW_MATCHING, *VARIANCE_EXPLODING):
        raise InputError(
            f"{path} is of {name or 'an unnamed scheduler'}, which is not supported; give a "
            "DDPM-like scheduler with betas, EDM or flow matching"
        )
    _refuse_other_estimates(path, name, config)
    if name in FLOW_MATCHING:
        return Flow(time_scale=float(config.get("num_train_timesteps", 1000)))
    if name in VARIANCE_EXPLODING:
        _prediction(path, config, ("epsilon",))
        names = ("sigma_data", "sigma_min", "sigma_max")
        return EDM(**{n: float(config[n]) for n in names if n in config})
    prediction = _prediction(path, config, get_args(Prediction))
    return DDPM(_alphas_cumprod(path, name, config), prediction=prediction)


def _refuse_other_estimates(path: Path, name: str, config: dict[str, Any]) -> None:
    """Refuse keys under which the scheduler's x0 is not the one of the four coefficients."""
    clips = config.get("clip_sample", name.startswith(("DDIM", "DDPM", "RePaint")))
    clip = float(config.get("clip_sample_range", 1.0))
    reasons = {
        "clip_sample_range": clips and clip != 1 and "which is no clip to [-1, 1]; give 1",
        "invert_sigmas": config.get("invert_sigmas") and "which reverses time; give false",
        "thresholding": config.get("thresholding") and "which rescales x0; give false",
        "timestep_type": config.get("timestep_type", "discrete") != "discrete"
        and "which tells the network other times; give 'discrete'",
        "use_flow_sigmas": config.get("use_flow_sigmas")
        and "which is flow matching; give FlowMatchEulerDiscreteScheduler",
    }
    unknown = {
        key: "which is not known here; remove it if the network was trained without it"
        for key, value in config.items()
        if not key.startswith("_") and key not in KNOWN_KEYS and value
    }
    for key, reason in {**reasons, **unknown}.items():
        if reason:
            raise InputError(f"{path}: {key} is {config[key]!r}, {reason}")


def _prediction(path: Path, config: dict[str, Any], known: tuple[str, ...]) -> Any:
    old = config.get("predict_epsilon")  # the key of diffusers before 0.10
    meant = "epsilon" if old is None or old else "sample"
    prediction = config.get("prediction_type", meant)
    if old is not None and prediction != meant:
        raise InputError(
            f"{path}: predict_epsilon is {old!r} but prediction_type is {prediction!r}; remove the "
            "wrong one"
        )
    if prediction not in known:
        raise InputError(
            f"{path}: prediction_type is {prediction!r}, which is not supported; give one of "
            f"{', '.join(known)}"
        )
    return prediction


def _alphas_cumprod(path: Path, name: str, config: dict[str, Any]) -> tuple[float, ...]:
    """Return the noise schedule as the scheduler itself computes it."""
    import diffusers

    given = {key: config[key] for key in _SCHEDULE if key in config}
    try:
        with warnings.catch_warnings():  # of numpy 2 about its own conversions in diffusers
            warnings.simplefilter("ignore")
            abar = getattr(diffusers, name)(**given).alphas_cumprod
    except NotImplementedError:
        raise InputError(
            f"{path}: beta_schedule is {config.get('beta_schedule')!r}, which {name} of diffusers "
            "does not know; give linear, scaled_linear or squaredcos_cap_v2"
        ) from None
    except ImportError as error:
        raise InputError(
            f"{path} is of {name}: {one_line(error)}; or give a DDPMScheduler"
        ) from None
    # A last step of pure noise (zero terminal SNR) has no finite sigma.
    return tuple(abar[abar > 1e-9].tolist())
