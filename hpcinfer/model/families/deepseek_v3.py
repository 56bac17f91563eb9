"""deepseek_v3 (DeepSeek-AI 2024, arXiv:2412.19437): v2 with sigmoid scores and their correction."""

from __future__ import annotations

from hpcinfer.model.architecture import Architecture, Config
from hpcinfer.model.families.deepseek_v2 import latent, refuse_other


def architecture(config: Config) -> Architecture:
    """Architecture of a deepseek_v3; layers that predict further tokens are not read."""
    refuse_other(config, "scoring_func", "sigmoid")
    refuse_other(config, "topk_method", "noaux_tc")
    E = config.size("n_routed_experts", "num_local_experts", "num_experts", default=256)
    router = config.router(
        E,
        8,
        score="sigmoid",
        normalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", default=2.5),
        groups=config.size("n_group", default=8),
        top_groups=config.size("topk_group", default=4),
        group_score="top2",
        corrected=True,
    )

    # Say what differs from deepseek_v2.
    return latent(
        config,
        E,
        router,
        dense=3,
        shared=1,
        F=2048,
        positions=4096,
        interleaved=config.flag("rope_interleave", True),
        unread_layers=config.count("num_nextn_predict_layers", "num_mtp_layers", default=1),
    )
