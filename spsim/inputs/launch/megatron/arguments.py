"""Arguments of Megatron-LM and what they are here, as `megatron/training/arguments.py` of core 0.16.1 has them."""

from __future__ import annotations

from spsim.inputs.launch.options import beginning_with, settings_named

LIBRARY = "megatron-core"
CALLED = "Megatron-LM"
VERSION = "0.16.1"
"""Of megatron-core, whose arguments these are."""

NUMBERS = settings_named((
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "seq_length", "micro_batch_size", "global_batch_size",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank",
    "microbatch_group_size_per_virtual_pipeline_stage", "ddp_bucket_size",
))  # fmt: skip
FLAGS = settings_named((
    "sequence_parallel", "overlap_p2p_communication_warmup_flush", "use_distributed_optimizer",
    "use_precision_aware_optimizer", "cross_entropy_loss_fusion", "tp_comm_overlap",
    "overlap_moe_expert_parallel_comm", "delay_wgrad_compute",
))  # fmt: skip
NO_MATTER = beginning_with(
    "adam", "adlr", "allow_ambiguous", "app_tag", "apply_layernorm_1p", "apply_query_key", "apply_wd", "async_save",
    "auto_detect", "calc_ft", "check_for", "check_weight_hash", "ckpt", "clip_grad", "config_logger", "data_args",
    "data_cache", "data_parallel_random_init", "data_path", "dataloader", "decoupled", "deterministic",
    "disable_ckpt", "disable_gloo", "disable_log", "disable_manual_gc", "disable_msc", "disable_straggler",
    "disable_strict", "dist_ckpt", "distrib_optim_fully", "distributed_backend", "distributed_timeout",
    "embedding_init", "empty_unused", "enable_ft", "end_weight", "eod", "error_injection", "eval", "exit",
    "finetune", "fp8_amax", "fp8_interval", "fp8_margin", "ft", "full_validation", "hysteresis", "init_method",
    "initial_loss_scale", "inprocess", "iterations_to_skip", "lazy_mpu", "legacy_tokenizer", "load", "local_rank",
    "log", "logging", "loss_scale", "lr", "manual_gc", "memory_snapshot_path", "merge_file", "mid_level",
    "min_loss_scale", "min_lr", "mock_data", "moe_aux_loss", "moe_input_jitter", "moe_per_layer_logging",
    "moe_router_bias_update", "moe_router_enable_expert_bias", "moe_router_force", "moe_router_group_topk",
    "moe_router_load_balancing", "moe_router_num_groups", "moe_router_pre_softmax", "moe_router_score",
    "moe_router_topk_scaling", "moe_token_drop_policy", "moe_z_loss", "mtp_loss", "multiple_validation",
    "nccl_communicator", "no_async_tensor",
    "no_barrier", "no_check_for_nan", "no_create_attention_mask", "no_data", "no_initialization", "no_load",
    "no_mmap", "no_one_logger", "no_save", "no_strict", "no_use_tokenizer", "no_weight_decay", "non_persistent",
    "norm_epsilon", "num_dataset", "num_workers", "object_storage", "one_logger", "override_opt", "per_dataset",
    "per_split", "persistent_save", "pretrained", "profile", "qk_clip", "record_memory", "replication", "rerun",
    "reset_position", "result_rejected", "rope_scaling", "rotary", "run_workload", "save", "seed", "sft_tokenizer",
    "skip_train", "split", "start_weight", "straggler", "te_rng", "tensorboard", "test_data", "test_mode",
    "tiktoken", "timing", "tokenizer", "train_data", "train_iters", "train_samples", "train_sync",
    "trust_remote_code", "use_checkpoint", "use_cpu_initialization", "use_dist_ckpt", "use_mcore_models",
    "use_persistent_ckpt", "use_pytorch_profiler", "use_rope_scaling", "valid_data", "vocab_extra", "vocab_file",
    "wandb", "weight_decay", "world_size",
)  # fmt: skip
"""Arguments of paths, logs, checkpoints, seeds, rates, numbers of steps, and of which experts a router picks."""
SWITCHES = frozenset({
    *FLAGS, "accumulate_allreduce_grads_in_fp32", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split", "add_qkv_bias", "bf16", "disable_bias_linear", "enable_cuda_graph",
    "external_cuda_graph", "fp16", "grad_reduce_in_bf16", "group_query_attention", "moe_enable_deepep",
    "moe_grouped_gemm",
    "moe_pad_expert_input_to_capacity", "moe_permute_fusion", "moe_router_fusion", "multi_latent_attention",
    "no_overlap_p2p_communication",
    "overlap_grad_reduce", "overlap_param_gather", "qk_layernorm", "recompute_activations", "squared_relu", "swiglu",
    "torch_fsdp2_no_reshard_after_forward", "untie_embeddings_and_output_weights", "use_flash_attn",
    "use_megatron_fsdp", "use_rotary_position_embeddings", "use_torch_fsdp2",
    "use_tp_pp_dp_mapping",
})  # fmt: skip
"""Arguments with nothing behind their name."""
OTHER_MODELS = ("hybrid_override_pattern", "is_hybrid_model")
"""What makes the model another one than spsim has."""

RECIPES = {
    "fp8": ("hybrid", "tensorwise"), "fp8_delayed": ("hybrid", "delayed"), "mxfp8": ("e4m3", "mxfp8"),
    "fp8_blockwise": ("e4m3", "blockwise"),
}  # fmt: skip
"""Precision here -> format and recipe of 8 bits."""
BACKENDS = {"auto": "flash", "fused": "cudnn", "flash": "flash", "unfused": "unfused", "local": "unfused"}
STAGES_INSIDE = "tp-ulysses-ring-pp-dp"
"""Order of axes under `use_tp_pp_dp_mapping`."""
POSITIONS = {"learned_absolute": "learned", "rope": "rope", "none": "none", "yarn": "rope"}
STRATEGIES = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
DTYPES = {"fp32": "fp32", "bf16": "bf16"}
