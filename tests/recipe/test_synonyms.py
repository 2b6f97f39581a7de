"""Law: whoever types the key of another framework, or an old one of ours, is told the field that it means here."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.recipe.schema.field_types import fields, place_at
from mtp_lightning.recipe.synonyms import FIELD_OF, NOTES, RENAMED, SPELLINGS, VALUES
from mtp_lightning.recipe.yaml import one_line_yaml

CONFIGS: dict[str, tuple[str, str]] = {
    "torchtitan": (
        """
        job: {dump_folder: out}
        training: {local_batch_size: 8, max_norm: 1.0, mixed_precision_param: bfloat16}
        lr_scheduler: {min_lr_factor: 0.1}
        activation_checkpoint: {mode: full}
        checkpoint: {interval: 500, keep_latest_k: 3, async_mode: async, initial_load_path: base}
        compile: {enable: true}
        metrics: {log_freq: 10, enable_wandb: true}
        parallelism: {data_parallel_shard_degree: 8}
        """,
        """
        job.dump_folder run.dir; training.local_batch_size batch.micro_batch_size
        training.max_norm optimizer.max_grad_norm; training.mixed_precision_param run.precision
        lr_scheduler.min_lr_factor optimizer.min_lr_ratio; activation_checkpoint.mode memory.recompute_trunk
        checkpoint.interval checkpoint.every_steps; checkpoint.keep_latest_k checkpoint.keep
        checkpoint.async_mode checkpoint.in_background; checkpoint.initial_load_path init.path
        compile.enable memory.compile; metrics.log_freq logging.every_steps; metrics.enable_wandb logging.loggers
        parallelism.data_parallel_shard_degree strategy.ranks_per_node
        """,
    ),
    "hugging_face": (
        """
        model: {n_embd: 768, n_layer: 12, n_head: 12, n_positions: 1024, rms_norm_eps: 1e-6, hidden_act: silu,
          attention_bias: true, rotary_pct: 0.25, num_nextn_predict_layers: 1, torch_dtype: bfloat16}
        per_device_train_batch_size: 8
        gradient_accumulation_steps: 4
        learning_rate: 3e-4
        warmup_ratio: 0.1
        max_steps: 100
        output_dir: out
        logging_steps: 10
        save_steps: 100
        save_total_limit: 3
        eval_steps: 100
        gradient_checkpointing: true
        report_to: [wandb]
        """,
        """
        model.n_embd model.hidden_size; model.n_layer model.num_hidden_layers; model.n_head model.num_attention_heads
        model.n_positions model.max_position_embeddings; model.rms_norm_eps model.norm_eps; model.hidden_act model.mlp
        model.attention_bias model.qkv_bias; model.rotary_pct model.partial_rotary_factor
        model.num_nextn_predict_layers heads.num_offsets; model.torch_dtype run.precision
        per_device_train_batch_size batch.micro_batch_size; gradient_accumulation_steps batch.global_batch_size
        learning_rate optimizer.lr; warmup_ratio optimizer.warmup_steps; max_steps run.steps; output_dir run.dir
        logging_steps logging.every_steps; save_steps checkpoint.every_steps; save_total_limit checkpoint.keep
        eval_steps run.validate_every_steps; gradient_checkpointing memory.recompute_trunk; report_to logging.loggers
        """,
    ),
    "megatron": (
        """
        --ffn-hidden-size: 4096
        --kv-channels: 64
        --num-query-groups: 8
        --seq-length: 2048
        --init-method-std: 0.02
        --normalization: RMSNorm
        --train-iters: 100
        --lr-warmup-iters: 10
        --min-lr: 1e-5
        --clip-grad: 1.0
        --rampup-batch-size: [16, 16, 1000]
        --recompute-granularity: full
        --mtp-num-layers: 3
        --mtp-loss-scaling-factor: 0.1
        --distributed-timeout-minutes: 10
        --save-interval: 500
        --save-retain-interval: 1000
        """,
        """
        --ffn-hidden-size model.intermediate_size; --kv-channels model.head_dim
        --num-query-groups model.num_key_value_heads; --seq-length data.seq_len
        --init-method-std model.initializer_range; --normalization model.norm; --train-iters run.steps
        --lr-warmup-iters optimizer.warmup_steps; --min-lr optimizer.min_lr_ratio
        --clip-grad optimizer.max_grad_norm; --rampup-batch-size batch.ramp
        --recompute-granularity memory.recompute_trunk; --mtp-num-layers heads.num_offsets
        --mtp-loss-scaling-factor objective.weights; --distributed-timeout-minutes health.hang_after_s
        --save-interval checkpoint.every_steps; --save-retain-interval checkpoint.keep_every_steps
        """,
    ),
    "deepspeed": (
        """
        train_batch_size: 64
        train_micro_batch_size_per_gpu: 8
        gradient_clipping: 1.0
        steps_per_print: 10
        bf16: {enabled: true}
        zero_optimization: {stage: 2, offload_optimizer: {device: cpu}, offload_param: {device: cpu, nvme_path: /nvme}}
        optimizer: {params: {lr: 1e-3}}
        scheduler: {params: {warmup_num_steps: 10, total_num_steps: 100}}
        """,
        """
        train_batch_size batch.global_batch_size; train_micro_batch_size_per_gpu batch.micro_batch_size
        gradient_clipping optimizer.max_grad_norm; steps_per_print logging.every_steps; bf16.enabled run.precision
        zero_optimization.stage strategy.kind; zero_optimization.offload_optimizer.device strategy.offload_optimizer
        zero_optimization.offload_param.device strategy.offload_parameters
        zero_optimization.offload_param.nvme_path strategy.nvme_path; optimizer.params.lr optimizer.lr
        scheduler.params.warmup_num_steps optimizer.warmup_steps; scheduler.params.total_num_steps run.steps
        """,
    ),
    "lightning": (
        """
        trainer: {max_steps: 100, val_check_interval: 10, accumulate_grad_batches: 4, default_root_dir: out}
        checkpoint: {train_time_interval: 30, every_n_train_steps: 500, save_top_k: 2}
        """,
        """
        trainer.max_steps run.steps; trainer.val_check_interval run.validate_every_steps
        trainer.accumulate_grad_batches batch.global_batch_size; trainer.default_root_dir run.dir
        checkpoint.train_time_interval checkpoint.every_minutes; checkpoint.every_n_train_steps checkpoint.every_steps
        checkpoint.save_top_k checkpoint.keep
        """,
    ),
    "litgpt": (
        """
        out_dir: out
        initial_checkpoint_dir: base
        tokenizer_dir: tok
        logger_name: csv
        model: {block_size: 2048, padded_vocab_size: 50304, n_query_groups: 4, rotary_percentage: 0.25}
        train: {save_interval: 100, log_interval: 1, lr_warmup_steps: 100, max_tokens: 1000000}
        eval: {interval: 100, max_iters: 10}
        """,
        """
        out_dir run.dir; initial_checkpoint_dir init.path; tokenizer_dir data.tokenizer; logger_name logging.loggers
        model.block_size data.seq_len; model.padded_vocab_size model.vocab_size
        model.n_query_groups model.num_key_value_heads; model.rotary_percentage model.partial_rotary_factor
        train.save_interval checkpoint.every_steps; train.log_interval logging.every_steps
        train.lr_warmup_steps optimizer.warmup_steps; train.max_tokens run.steps
        eval.interval run.validate_every_steps; eval.max_iters run.validation_samples
        """,
    ),
    "olmo": (
        """
        model: {d_model: 2048, n_layers: 16, n_kv_heads: 8, mlp_hidden_size: 8192, weight_tying: true,
          attention_layer_norm: true, max_sequence_length: 4096}
        global_train_batch_size: 512
        device_train_microbatch_size: 4
        max_duration: 1000
        save_folder: out
        load_path: base
        softmax_auxiliary_loss: true
        scheduler: {t_warmup: 100, alpha_f: 0.1}
        """,
        """
        model.d_model model.hidden_size; model.n_layers model.num_hidden_layers
        model.n_kv_heads model.num_key_value_heads; model.mlp_hidden_size model.intermediate_size
        model.weight_tying model.tie_word_embeddings; model.attention_layer_norm model.qk_norm
        model.max_sequence_length model.max_position_embeddings; global_train_batch_size batch.global_batch_size
        device_train_microbatch_size batch.micro_batch_size; max_duration run.steps; save_folder run.dir
        load_path init.path; softmax_auxiliary_loss objective.z_loss; scheduler.t_warmup optimizer.warmup_steps
        scheduler.alpha_f optimizer.min_lr_ratio
        """,
    ),
    "axolotl": (
        """
        base_model: base
        adapter: lora
        lora_r: 8
        lora_alpha: 16
        lora_target_modules: [q_proj, v_proj]
        sequence_len: 2048
        sample_packing: true
        clip_threshold: 1.0
        decay_rate: -0.8
        val_set_size: 0.05
        num_epochs: 3
        wandb_project: mine
        """,
        """
        base_model init.path; adapter adapt.lora; lora_r adapt.lora.rank; lora_alpha adapt.lora.alpha
        lora_target_modules adapt.lora.targets; sequence_len data.seq_len; sample_packing data.packing
        clip_threshold optimizer.adafactor.clip_threshold; decay_rate optimizer.adafactor.beta2_decay
        val_set_size data.validation_fraction; num_epochs run.steps; wandb_project logging.loggers
        """,
    ),
}
"""Configurations as their frameworks have them, and for each key the field of ours that its user is told."""

OVERRIDES = {
    "training.local_batch_size=8": "Write batch.micro_batch_size=VALUE.",
    "gradient_accumulation_steps=4": "Write batch.global_batch_size=VALUE (global_batch_size = micro_batch_size x",
    "--seq-length=2048": "Write data.seq_len=VALUE.",
    "model.n_embd=64": "Write model.hidden_size=VALUE.",
    "num_nextn_predict_layers=1": "Write heads.num_offsets=2 (num_offsets counts the next token too: one more",
    "zero_optimization.stage=3": "Write strategy.kind=zero3.",
    "optim=adafactor": "Write optimizer.kind=adafactor.",
    "bf16=true": "Write run.precision=bf16.",
    "lora_target_modules=[q_proj, v_proj]": 'Write "adapt.lora.targets=[q, v]".',
    "--untie-embeddings-and-output-weights=true": "Write model.tie_word_embeddings=false.",
    "max_tokens=1e9": "Write run.steps=VALUE (divide the tokens by batch.global_batch_size x data.seq_len).",
    "run.setps=5": "Write run.steps=VALUE.",
}

HINTS_FOR_OLD_VALUES = {
    "data.attention=document": "Write data.document_mask=true.",
    "data.attention=window": "Write data.document_mask=false.",
    "heads.trainable_from=3": "Write freeze=[offsets_below_3] (offsets_below_K freezes all",
    "adapt.frozen=[trunk, mixtures]": 'Write "freeze=[trunk, layer_mix]".',
    "batch.rows=8": "Write batch.global_batch_size=VALUE.",
    "rows=8": "Write batch.global_batch_size=VALUE.",
}


def told(path: Path, *overrides: str) -> tuple[str, dict[str, str]]:
    """Run `mtp recipe check`; return its report as one line, and the nearest field of ours for each faulty path."""
    result = CliRunner().invoke(app, ["recipe", "check", str(path), *overrides])
    assert result.exit_code == 2
    report = " ".join(result.output.split())
    _, *parts = re.split(r"(\S+) must be a field of ", report)
    nearest = [re.search(r" nearest (\S+) hint ", text) for text in parts[1::2]]
    return report, dict(zip(parts[::2], (found[1] if found else "" for found in nearest), strict=True))


def pairs(text: str) -> dict[str, str]:
    """Read `theirs ours` of each line and each part between semicolons."""
    rows = (pair.split() for line in text.split("\n") for pair in line.split(";"))
    return {row[0]: row[1] for row in rows if row}


def written(tmp_path: Path, text: str) -> Path:
    """Write a recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("framework", CONFIGS)
def test_config_of_another_framework_is_told_our_fields(framework: str, tmp_path: Path) -> None:
    text, expected = CONFIGS[framework]
    _, nearest = told(written(tmp_path, "\n".join(line.removeprefix(" " * 8) for line in text.split("\n"))))
    assert nearest == pairs(expected)


@pytest.mark.parametrize(("override", "hint"), OVERRIDES.items())
def test_override_of_another_framework_is_told_what_to_write(override: str, hint: str, tmp_path: Path) -> None:
    assert hint in told(written(tmp_path, "name: sound\n"), "--", override)[0]


@pytest.mark.parametrize(("override", "hint"), HINTS_FOR_OLD_VALUES.items())
def test_override_of_before_is_told_what_to_write(override: str, hint: str, tmp_path: Path) -> None:
    assert hint in told(written(tmp_path, "name: sound\n"), "--", override)[0]


@pytest.mark.parametrize("prefix", [(), ("phases", "first")], ids=["recipe", "phase"])
def test_recipe_of_before_is_told_all_new_names_in_one_report(prefix: tuple[str, ...], tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    old_names = [old for old in RENAMED if not prefix or not old.startswith("model.")]
    for old in old_names:
        *sections, last = (*prefix, *old.split("."))
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = {"rows": 3} if old == "run.guard" else 1
    text = one_line_yaml({**tree, "qqq": 1})
    assert told(written(tmp_path, f"{text}\n"))[1] == {
        **{".".join((*prefix, old)): RENAMED[old] for old in old_names},
        "qqq": "",
    }


def test_table_is_long() -> None:
    assert sum(len(spellings.split()) for spellings in SPELLINGS.values()) >= 160
    assert len([pair for _, expected in CONFIGS.values() for pair in pairs(expected)]) >= 80


def test_no_spelling_stands_twice() -> None:
    spellings = [spelling for several in SPELLINGS.values() for spelling in several.split()]
    assert len(set(spellings)) == len(spellings)
    assert {*NOTES, *VALUES} <= FIELD_OF.keys()


def test_every_target_is_a_place_of_the_schema() -> None:
    assert not [target for target in FIELD_OF.values() if place_at(target.split(".")) is None]


def test_no_spelling_is_a_field_of_ours_with_another_meaning() -> None:
    ours = dict(our_names())
    assert not [spelling for spelling, target in FIELD_OF.items() if ours.get(spelling, target) != target]
    assert not [old for old in RENAMED if place_at(old.split("."))]


def our_names() -> Iterator[tuple[str, str]]:
    """Yield every field by its path and by its last name."""
    for place in fields():
        yield ".".join(place.names), ".".join(place.names)
        yield place.names[-1], ".".join(place.names)
