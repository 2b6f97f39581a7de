"""Config keys of other frameworks, and our own before they were renamed: which field of ours each one means.

Spellings of Hugging Face (configs and TrainingArguments), torchtitan, Megatron-LM, DeepSpeed, litgpt, OLMo, axolotl
and PEFT. A spelling with dots counts where these sections end a path, one without dots counts anywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RENAMED: Mapping[str, str] = {
    "model.width": "model.hidden_size",
    "model.num_layers": "model.num_hidden_layers",
    "model.head_width": "model.head_dim",
    "model.mlp_width": "model.intermediate_size",
    "model.vocabulary": "model.vocab_size",
    "model.max_positions": "model.max_position_embeddings",
    "model.rotary_share": "model.partial_rotary_factor",
    "model.tie_embeddings": "model.tie_word_embeddings",
    "model.init_std": "model.initializer_range",
    "heads.match_parameters": "heads.layers_from_trunk",
    "heads.isolate_trunk": "heads.detach_trunk",
    "heads.trainable_from": "freeze",
    "adapt.frozen": "freeze",
    "adapt.weighted_states": "adapt.layer_mix",
    "objective.schedule": "objective.backward_order",
    "objective.checkpoint_trunk": "memory.recompute_trunk",
    "objective.checkpoint_heads": "memory.recompute_heads",
    "objective.compile": "memory.compile",
    "data.window_tokens": "data.seq_len",
    "data.attention": "data.document_mask",
    "data.order": "data.shuffle",
    "data.group_shards": "data.shuffle_shards",
    "data.mixture_epochs": "data.max_epochs",
    "data.validation_share": "data.validation_fraction",
    "batch.rows": "batch.global_batch_size",
    "batch.micro_rows": "batch.micro_batch_size",
    "batch.ramp.from_rows": "batch.ramp.from_batch_size",
    "batch.ramp.over_rows": "batch.ramp.over_samples",
    "optimizer.decay_ratio": "optimizer.min_lr_ratio",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "run.fresh": "run.restart",
    "run.validation_rows": "run.validation_samples",
    "run.start_from": "init.path",
    "run.keep_optimizer": "init.optimizer",
    "run.keep_position": "init.data_position",
    "run.checkpoint_every_steps": "checkpoint.every_steps",
    "run.keep_checkpoints": "checkpoint.keep",
    "run.checkpoint_in_background": "checkpoint.in_background",
    "run.log_every_steps": "logging.every_steps",
    "run.guard": "health.drift",
    "run.hang_after_s": "health.hang_after_s",
    "run.hang_factor": "health.hang_factor",
    "run.nonfinite": "health.nonfinite",
}
"""Our own spellings of version 0.1.0, each with the section it stood in."""

SPELLINGS: Mapping[str, str] = {
    "model.hidden_size": "n_embd d_model dim embed_dim",
    "model.num_hidden_layers": "n_layer n_layers num_transformer_layers",
    "model.num_attention_heads": "n_head n_heads num_heads",
    "model.num_key_value_heads": "n_kv_heads num_kv_heads n_query_groups num_query_groups",
    "model.head_dim": "head_size kv_channels",
    "model.intermediate_size": "ffn_hidden_size n_inner mlp_hidden_size ffn_dim ffn_dim_multiplier mlp_ratio",
    "model.vocab_size": "padded_vocab_size n_vocab make_vocab_size_divisible_by",
    "model.max_position_embeddings": "n_positions n_ctx model.max_seq_len model.max_sequence_length",
    "model.rope_theta": "rotary_base rotary_emb_base rope_base",
    "model.rope_scaling.kind": "rope_type rope_scaling.type",
    "model.rope_scaling.original_positions": "original_max_position_embeddings",
    "model.partial_rotary_factor": "rotary_pct rotary_percent rotary_percentage",
    "model.norm": "normalization norm_class_name layer_norm_type",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon",
    "model.mlp": "hidden_act hidden_activation activation_function activation_type mlp_class_name model.swiglu swiglu",
    "model.parallel_residual": "use_parallel_residual",
    "model.qkv_bias": "attention_bias add_qkv_bias attn_bias",
    "model.mlp_bias": "add_bias_linear",
    "model.qk_norm": "qk_layernorm use_qk_norm attention_layer_norm norm_qk",
    "model.tie_word_embeddings": "weight_tying enable_weight_tying untie_embeddings_and_output_weights",
    "model.initializer_range": "init_method_std",
    "model.family": "model_type architectures",
    "heads.num_offsets": "num_nextn_predict_layers num_mtp_layers mtp_num_layers num_mtp_modules medusa_num_heads "
    "n_future_tokens num_future_tokens",
    "heads.layers_per_head": "medusa_num_layers",
    "heads.draft_vocabulary": "draft_vocab_size draft_vocab d2t t2d vocab_mapping_path token_freq_path "
    "speculative_token_map",
    "adapt.lora": "adapter peft_config",
    "adapt.lora.rank": "lora_r lora.r lora_rank",
    "adapt.lora.alpha": "lora_alpha",
    "adapt.lora.dropout": "lora_dropout",
    "adapt.lora.targets": "lora_target_modules target_modules lora_target_linear",
    "freeze": "unfrozen_parameters modules_to_freeze freeze_backbone freeze_base_model",
    "objective.weights": "mtp_loss_scaling_factor mtp_loss_weight mtp_loss_weights mtp_loss_lambda",
    "objective.rollout": "ttt_length ttt_steps training_time_test use_ttt use_off_policy_tokens on_policy "
    "on_policy_rollout mtp_rollout scheduled_sampling",
    "objective.z_loss": "softmax_auxiliary_loss z_loss_multiplier auxiliary_loss_multiplier",
    "objective.label_smoothing": "label_smoothing_factor",
    "memory.recompute_trunk": "gradient_checkpointing activation_checkpoint.mode activation_checkpointing "
    "recompute_granularity recompute_activations recompute_method",
    "memory.cache_hidden_states": "train_hidden_states_path hidden_states_path offline_hidden_states",
    "strategy.reduce_dtype": "communication_data_type mixed_precision_reduce training.mixed_precision_reduce "
    "grad_reduce_in_fp32 grad_reduce_in_bf16 accumulate_allreduce_grads_in_fp32",
    "memory.loss_kernel": "use_liger_kernel use_liger liger_kernel liger_fused_linear_cross_entropy cut_cross_entropy "
    "use_fused_linear_cross_entropy fused_linear_ce_loss cross_entropy_loss_fusion loss_backend",
    "memory.compile": "torch_compile compile.enable compile_model compile_config",
    "data.corpus": "dataset datasets dataset_path dataset_name train_data_path",
    "data.shards": "data_path data_cache_path",
    "data.text_field": "dataset_text_field text_column text_key content_field field",
    "data.mixture": "data_mix data_mixture",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_dir tokenizer_type tokenizer_name hf_assets_path",
    "data.parse_special_tokens": "parse_special split_special_tokens",
    "data.add_special_tokens": "add_special add_bos add_bos_token",
    "data.chat_template": "chat_template_path chat_template_jinja",
    "data.seq_len": "seq_length sequence_length sequence_len max_seq_length max_seq_len max_seqlen max_sequence_length "
    "block_size context_length cutoff_len",
    "data.packing": "sample_packing",
    "data.document_mask": "reset_attention_mask reset_position_ids generate_doc_lengths intra_document_masking",
    "data.workers": "dataloader_num_workers num_workers",
    "data.validation_fraction": "val_set_size val_split_fraction split",
    "batch.global_batch_size": "train_batch_size global_train_batch_size batch_size gradient_accumulation_steps "
    "gradient_accumulation_iters accumulate_grad_batches num_microbatches",
    "batch.micro_batch_size": "train_micro_batch_size_per_gpu per_device_train_batch_size local_batch_size "
    "device_train_microbatch_size rank_microbatch_size device_batch_size",
    "batch.ramp": "rampup_batch_size batch_size_warmup",
    "optimizer.lr": "learning_rate warmup_max_lr max_lr",
    "optimizer.mup_base_width": "mup_base_hidden_size",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.warmup_steps": "warmup_ratio lr_warmup_steps lr_warmup_iters warmup_iters warmup_num_steps t_warmup "
    "lr_warmup_fraction lr_warmup_samples",
    "optimizer.min_lr_ratio": "min_lr min_lr_factor min_lr_rate alpha_f eta_min cos_min_ratio",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler lr_decay_style scheduler.type scheduler.name "
    "lr_scheduler.name scheduler_type",
    "optimizer.decay_fraction": "lr_scheduler.decay_ratio num_decay_steps lr_wsd_decay_iters wsd_decay_iters "
    "cooldown_fraction",
    "optimizer.decay_shape": "lr_scheduler.decay_type decay_type lr_wsd_decay_style wsd_decay_style",
    "optimizer.warmup_from": "lr_warmup_init warmup_min_lr warmup_init_lr lr_warmup_start warmup_min_ratio",
    "optimizer.kind": "optim optimizer.type optimizer.name optimizer_name optimizer_type use_muon",
    "optimizer.muon.momentum": "muon_momentum muon_beta",
    "optimizer.muon.nesterov": "muon_use_nesterov muon_nesterov",
    "optimizer.muon.ns_steps": "muon_num_ns_steps newton_schulz_steps",
    "optimizer.adafactor": "scale_parameter relative_step",
    "optimizer.adafactor.beta2_decay": "beta2_decay decay_rate adafactor_decay_rate",
    "optimizer.adafactor.clip_threshold": "clip_threshold clipping_threshold",
    "optimizer.muon.adjust_lr": "adjust_lr_fn muon_scale_mode",
    "optimizer.ema.decay": "ema_decay ema_beta ema_momentum ema.beta use_ema",
    "optimizer.ema.every_steps": "ema_update_every ema_update_interval update_ema_every",
    "optimizer.ema.from_step": "ema_start_step ema_start step_start_ema",
    "optimizer.max_grad_norm": "clip_grad gradient_clipping grad_clip max_norm gradient_clip_val",
    "run.dir": "output_dir out_dir save_folder dump_folder checkpoint.folder default_root_dir save",
    "run.steps": "max_steps train_iters max_iters max_duration total_num_steps num_train_steps "
    "num_train_epochs num_epochs max_tokens train_samples",
    "run.deterministic": "full_determinism use_deterministic_algorithms deterministic_mode cudnn_deterministic",
    "run.seed": "data_seed init_seed",
    "run.precision": "bf16 fp16 bf16.enabled fp16.enabled torch_dtype dtype mixed_precision mixed_precision_param",
    "run.restart": "overwrite_output_dir",
    "run.validate_every_steps": "eval_steps eval_interval eval_freq validation.freq eval.interval val_check_interval "
    "evals_per_epoch",
    "run.validation_samples": "eval_iters max_eval_samples eval.max_iters limit_val_batches",
    "run.early_stop.validations": "early_stopping_patience",
    "run.early_stop.least_gain": "early_stopping_threshold",
    "init.path": "model_name_or_path pretrained_model_name_or_path base_model initial_checkpoint_dir initial_load_path "
    "load load_path resume_from_checkpoint init_from",
    "checkpoint.every_steps": "save_steps save_interval checkpoint.interval checkpoint_interval saves_per_epoch "
    "every_n_train_steps checkpoint_every_n_steps checkpoint_period save_interval_updates",
    "checkpoint.every_minutes": "train_time_interval",
    "checkpoint.keep": "save_total_limit keep_latest_k save_num_checkpoints_to_keep save_top_k "
    "save_last_n keep_last_n_checkpoints keep_interval_updates",
    "checkpoint.keep_every_steps": "save_retain_interval keep_checkpoint_every_n_steps keep_period",
    "checkpoint.in_background": "async_save async_mode save_async",
    "logging.every_steps": "logging_steps log_interval log_freq steps_per_print log_every_n_steps console_log_interval",
    "logging.loggers": "report_to logger_name wandb wandb_project use_wandb enable_wandb enable_tensorboard "
    "tensorboard tensorboard_dir",
    "health.hang_after_s": "distributed_timeout_minutes ddp_timeout train_timeout_seconds",
    "strategy.kind": "zero_optimization.stage zero_stage fsdp sharding_strategy use_distributed_optimizer",
    "strategy.ranks_per_node": "nproc_per_node gpus_per_node n_gpus_per_node data_parallel_shard_degree "
    "data_parallel_replicate_degree",
    "strategy.num_nodes": "nnodes",
    "strategy.sequence_parallel": "sequence_parallel_size sequence_parallel_degree sp_size ulysses_degree "
    "ulysses_sequence_parallel_size context_parallel_size context_parallel_degree cp_size",
    "strategy.offload_optimizer": "offload_optimizer.device optimizer_cpu_offload",
    "strategy.offload_parameters": "offload_param.device enable_cpu_offload",
    "strategy.nvme_path": "offload_optimizer.nvme_path offload_param.nvme_path",
    "strategy.deepspeed": "reduce_bucket_size allgather_bucket_size overlap_comm contiguous_gradients",
    "name": "run_name exp_name wandb_name",
}
"""Fields of ours, and how others spell them."""

ACCUMULATION = "global_batch_size = micro_batch_size x ranks x steps of accumulation"
COUNTS_NEXT_TOKEN = "num_offsets counts the next token too: one more than the extra layers"
HOW_FAR = "how far it goes is heads.num_offsets; every offset reads the state before it in any case"
TOKENS = "divide the tokens by batch.global_batch_size x data.seq_len"
NOTES: Mapping[str, str] = {
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_accumulation_iters": ACCUMULATION,
    "accumulate_grad_batches": ACCUMULATION,
    "num_microbatches": ACCUMULATION,
    "batch_size": "it counts sequences of all ranks; those of one rank at a time are batch.micro_batch_size",
    "rank_microbatch_size": "it counts sequences: divide the tokens by data.seq_len",
    "num_nextn_predict_layers": COUNTS_NEXT_TOKEN,
    "num_mtp_layers": COUNTS_NEXT_TOKEN,
    "mtp_num_layers": COUNTS_NEXT_TOKEN,
    "num_mtp_modules": COUNTS_NEXT_TOKEN,
    "medusa_num_heads": COUNTS_NEXT_TOKEN,
    "mtp_loss_scaling_factor": "as {kind: lambda, start: X, end: X}: each extra offset has X / (num_offsets - 1)",
    "ttt_length": HOW_FAR,
    "ttt_steps": HOW_FAR,
    "use_off_policy_tokens": "the other way round: true means the given tokens, which is null here",
    "ffn_dim_multiplier": "write the width itself",
    "mlp_ratio": "it is the ratio times hidden_size",
    "make_vocab_size_divisible_by": "write the padded size itself",
    "adam_beta1": "as a list, [beta1, beta2]",
    "adam_beta2": "as a list, [beta1, beta2]",
    "beta1": "as a list, [beta1, beta2]",
    "beta2": "as a list, [beta1, beta2]",
    "warmup_ratio": "it is the ratio times run.steps",
    "lr_warmup_fraction": "it is the fraction times run.steps",
    "lr_warmup_samples": "divide the samples by batch.global_batch_size",
    "min_lr": "it is min_lr / lr",
    **dict.fromkeys(("lr_warmup_init", "warmup_min_lr", "warmup_init_lr", "lr_warmup_start"), "it is that rate / lr"),
    **dict.fromkeys(("num_decay_steps", "lr_wsd_decay_iters", "wsd_decay_iters"), "it is the steps / run.steps"),
    "lr_scheduler.decay_ratio": "of optimizer.schedule=wsd",
    **dict.fromkeys(("decay_rate", "adafactor_decay_rate"), "of optimizer.kind=adafactor, as a negative power: -0.8"),
    "scale_parameter": "with optimizer.kind=adafactor rates are always relative to the size of a parameter",
    "relative_step": "with optimizer.kind=adafactor rates never exceed one over the root of the step",
    "use_ema": "optimizer.ema={} for the defaults",
    "eta_min": "it is eta_min / lr",
    "max_tokens": TOKENS,
    "max_duration": f"for a length in tokens, {TOKENS}",
    "train_samples": "divide the samples by batch.global_batch_size",
    "num_train_epochs": f"for an epoch, {TOKENS}",
    "num_epochs": f"for an epoch, {TOKENS}",
    "eval_iters": "it is the iterations times the batch of one",
    "eval.max_iters": "it is the iterations times the batch of one",
    "model_name_or_path": "import the model first: mtp import",
    "pretrained_model_name_or_path": "import the model first: mtp import",
    "base_model": "import the model first: mtp import",
    "resume_from_checkpoint": "a run whose run.dir has a checkpoint is continued without being told",
    "evals_per_epoch": "count steps",
    "train_time_interval": "in minutes",
    "saves_per_epoch": "count steps",
    "reset_position_ids": "positions restart at every document then",
    "fsdp": "shard the optimizer's state (zero1), gradients too (zero2), parameters too (zero3)",
    "data_parallel_shard_degree": "the ranks are strategy.num_nodes x ranks_per_node, sharded as strategy.kind says",
    "data_parallel_replicate_degree": "the ranks are strategy.num_nodes x ranks_per_node",
    "reduce_bucket_size": "beneath zero_optimization, as DeepSpeed has it",
    "allgather_bucket_size": "beneath zero_optimization, as DeepSpeed has it",
    "overlap_comm": "beneath zero_optimization, as DeepSpeed has it",
    "contiguous_gradients": "beneath zero_optimization, as DeepSpeed has it",
    "val_set_size": "it is a fraction of the documents",
    "split": "it is a fraction of the documents",
    "trainable_from": "offsets_below_K freezes all that the offsets before K compute with",
}
"""How a value translates, where it is not the same."""

Translation = Mapping[Any, Any] | Callable[[Any], Any]
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "bf16": "bf16", "fp16": "fp16", "no": "fp32"}
NORMS = {"RMSNorm": "rms", "LayerNorm": "layer", "rmsnorm": "rms", "rms": "rms", "layernorm": "layer"}
ACTIVATIONS = {"silu": "swiglu", "swiglu": "swiglu", "gelu": "gelu", "gelu_new": "gelu", True: "swiglu"}
ZERO = {0: "single", 1: "zero1", 2: "zero2", 3: "zero3"}


def _one_more(extra_layers: Any) -> Any:
    return extra_layers + 1 if isinstance(extra_layers, int) else None


def _list_without_suffix(modules: Any) -> Any:
    return [str(name).removesuffix("_proj") for name in modules] if isinstance(modules, list) else None


def _frozen_below(offset: Any) -> Any:
    return [f"offsets_below_{offset}"] if isinstance(offset, int) else None


def _frozen_parts(parts: Any) -> Any:
    return ["layer_mix" if part == "mixtures" else part for part in parts] if isinstance(parts, list) else None


def _loss_factor(factor: Any) -> Any:
    return {"kind": "lambda", "start": factor, "end": factor} if isinstance(factor, int | float) else None


def _optimizer_kind(name: Any) -> Any:
    return next((kind for kind in ("muon", "adafactor", "adamw") if kind in str(name).lower()), None)


SCHEDULES = {
    **dict.fromkeys(("cosine", "cosine_with_min_lr", "cosine_with_warmup", "warmupcosinelr"), "cosine"),
    **dict.fromkeys(("linear", "linear_with_warmup", "warmupdecaylr"), "linear"),
    **dict.fromkeys(("constant", "constant_with_warmup", "warmuplr"), "constant"),
    **dict.fromkeys(("inverse_sqrt", "inverse_sqrt_with_warmup", "inverse-square-root"), "inverse_sqrt"),
    **dict.fromkeys(("wsd", "wsds", "warmup_stable_decay"), "wsd"),
}
DECAY_SHAPES = {"sqrt": "1-sqrt", "1-sqrt": "1-sqrt", "minus_sqrt": "1-sqrt", "linear": "linear", "cosine": "cosine"}


def _schedule(name: Any) -> Any:
    return SCHEDULES.get(str(name).lower())


VALUES: Mapping[str, Translation] = {
    **dict.fromkeys(
        ("lr_scheduler_type", "lr_scheduler", "lr_decay_style", "scheduler.type", "scheduler.name"), _schedule
    ),
    **dict.fromkeys(("lr_scheduler.name", "scheduler_type"), _schedule),
    **dict.fromkeys(("optim", "optimizer.type", "optimizer.name", "optimizer_name", "optimizer_type"), _optimizer_kind),
    "use_muon": {True: "muon", False: "adamw"},
    **dict.fromkeys(("lr_scheduler.decay_type", "decay_type", "lr_wsd_decay_style", "wsd_decay_style"), DECAY_SHAPES),
    "attention": {"document": True, "window": False},
    "trainable_from": _frozen_below,
    "frozen": _frozen_parts,
    **dict.fromkeys((key for key, note in NOTES.items() if note == COUNTS_NEXT_TOKEN), _one_more),
    "mtp_loss_scaling_factor": _loss_factor,
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_type", "swiglu", "model.swiglu"), ACTIVATIONS),
    **dict.fromkeys(("normalization", "norm_class_name", "layer_norm_type"), NORMS),
    **dict.fromkeys(("torch_dtype", "dtype", "mixed_precision", "mixed_precision_param"), PRECISIONS),
    **{key: {True: key[:4]} for key in ("bf16", "bf16.enabled", "fp16", "fp16.enabled")},
    "untie_embeddings_and_output_weights": {True: False, False: True},
    "add_bias_linear": {True: True, False: False},
    **dict.fromkeys(("lora_target_modules", "target_modules"), _list_without_suffix),
    "activation_checkpoint.mode": {"full": True, "none": False},
    "recompute_granularity": {"full": True},
    "sample_packing": {True: "best_fit", False: "cut"},
    **dict.fromkeys(("zero_optimization.stage", "zero_stage"), ZERO),
    "use_distributed_optimizer": {True: "zero1"},
    "distributed_timeout_minutes": lambda minutes: 60.0 * minutes if isinstance(minutes, int | float) else None,
}
"""Our value for one of theirs; what is not among these has none, or is the same."""


@dataclass(frozen=True)
class Synonym:
    """What a foreign key means here."""

    spelling: str  # theirs, as the table has it
    field: str  # dotted path of ours
    note: str = ""  # how the value translates
    value: Any = None  # the value translated; None where it is the same, or needs arithmetic


OURS_ELSEWHERE = ("order", "schedule")
"""Last names of ours from before that another section has now (`heads.order`)."""

FIELD_OF: Mapping[str, str] = {
    **{last: new for old, new in RENAMED.items() if (last := old.rpartition(".")[2]) not in OURS_ELSEWHERE},
    **{spelling: ours for ours, spellings in SPELLINGS.items() for spelling in spellings.split()},
    **RENAMED,
}
"""Our field for every spelling."""


def synonym_of(names: tuple[str, ...], value: Any = None) -> Synonym | None:
    """Return what a key of another framework means, looked up by the longest end of its path.

    >>> synonym_of(("training", "--seq-length"), 2048)
    Synonym(spelling='seq_length', field='data.seq_len', note='', value=None)
    >>> synonym_of(("zero_optimization", "stage"), 2).value
    'zero2'
    """
    plain = [name.lstrip("-").lower().replace("-", "_") for name in names]
    ends = (".".join(plain[first:]) for first in range(len(plain)))
    key = next((end for end in ends if end in FIELD_OF), None)
    if key is None:
        return None
    last = key.rpartition(".")[2]
    translation = VALUES.get(key) or VALUES.get(last)
    return Synonym(key, FIELD_OF[key], NOTES.get(key) or NOTES.get(last, ""), _translated(translation, value))


def _translated(translation: Translation | None, value: Any) -> Any:
    if callable(translation):
        return translation(value)
    return translation.get(value) if translation and isinstance(value, str | int) else None
