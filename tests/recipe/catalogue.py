"""Every fault that a recipe can have: the files and the overrides that show it."""

from dataclasses import dataclass, field
from itertools import pairwise

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Case:
    """A folder of files, of which `recipe.yaml` is loaded with overrides."""

    name: str
    text: str | bytes | None = ""
    overrides: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


FOREIGN = ("model.family=transformers", "heads.layers_from_trunk=false")
TWO_SLICES = ("strategy.kind=zero2", "strategy.ranks_per_node=2", "strategy.sequence_parallel=2")
GPT2 = "model.hf_config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4, vocab_size: 300}"
STREAM = ("data.kind=webdataset_stream", "data.stream={train: [a.tar], validation: [b.tar]}")


def _broken(name: str, *overrides: str) -> Case:
    """A rule broken by overrides on a recipe of defaults."""
    return Case(name, "name: sound\n", overrides)


FILES = (
    Case("file_missing", None),
    Case("file_missing_with_a_neighbour", None, files={"recipes.yaml": "name: neighbour\n"}),
    Case("file_empty", "# only a comment\n"),
    Case("file_is_not_text", b"\xff\xfe\x00\x01"),
    Case("file_holds_a_list", "- model\n- heads\n"),
    Case("file_holds_text", "just a sentence\n"),
    Case("yaml_open_bracket", "data:\n  corpus: [src\nname: x\n"),
    Case("yaml_tab", "model:\n\thidden_size: 64\n"),
    Case("yaml_bad_indentation", "model:\n  hidden_size: 64\n num_hidden_layers: 4\n"),
    Case("yaml_control_character", "name: x\nmodel: \x07\n"),
    Case("yaml_two_documents", "name: a\n---\nname: b\n"),
    Case("yaml_nested_without_end", "model: " + "[" * 3000),
    Case("yaml_nested_deep", "model: " + "[" * 150 + "]" * 150),
    Case(
        "yaml_flood_of_aliases",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in pairwise("abcdefghij")),
    ),
    Case("yaml_foreign_tag", "name: !!python/name:os.system\n"),
    Case("yaml_tagged_mapping", "model: !mine {hidden_size: 64}\n"),
    Case("yaml_tag_that_does_not_fit", "model:\n  qkv_bias: !!bool maybe\n"),
    Case("yaml_alias_to_itself", "model: &loop\n  hidden_size: *loop\n"),
    Case("yaml_open_quotes", "name: 'x\n"),
    Case("yaml_missing_colon", "model:\n  hidden_size: 64\n  num_hidden_layers\n"),
    Case("yaml_second_colon", "run:\n  dir: runs: mine\n"),
    Case("yaml_unknown_alias", "name: *nobody\n"),
    Case("yaml_merge_of_text", "run:\n  <<: other.yaml\n"),
    Case("yaml_merge_of_itself", "run: &loop\n  <<: *loop\n"),
    Case("yaml_merged_typo", "optimizer: &fast {lr: 1e-3}\nrun:\n  <<: *fast\n  steps: 5\n"),
    Case("yaml_key_that_is_a_list", "? [a, b]\n: 3\n"),
    Case("yaml_number_too_long", f"run:\n  seed: {'9' * 5000}\n"),
    Case("duplicate_key", "run:\n  steps: 5\n  seed: 1\n  steps: 6\n"),
    Case("duplicate_section", "run:\n  steps: 500\nmodel:\n  hidden_size: 64\nrun:\n  seed: 1\n"),
    Case("extends_missing_file", "extends: bases.yaml\nrun:\n  steps: 0\n", files={"base.yaml": "name: x\n"}),
    Case("extends_two_parents", "extends: [a.yaml, b.yaml]\n"),
    Case("extends_a_name_that_no_file_can_have", f"extends: {'x' * 300}\n"),
    Case("extends_itself", f"extends: {RECIPE}\n"),
    Case(
        "extends_in_a_circle", "extends: a.yaml\n", files={"a.yaml": "extends: b.yaml\n", "b.yaml": "extends: a.yaml\n"}
    ),
    Case("extends_a_faulty_parent", "extends: base.yaml\n", files={"base.yaml": "# base\nrun:\n  stesp: 5\n"}),
    Case("extends_an_empty_parent", "extends: base.yaml\n", files={"base.yaml": ""}),
)

OVERRIDES = (
    _broken("override_without_equals_sign", "run.steps"),
    _broken("override_without_path", "=5"),
    _broken("override_with_empty_name", "run..steps=5"),
    _broken("override_without_value", "run.steps="),
    _broken("override_with_bad_yaml", "data.corpus=[src"),
    _broken("override_split_by_the_shell", "data.corpus=[src,", "docs]"),
    _broken("override_outside_its_section", "steps=5"),
    _broken("override_of_extends", "extends=base.yaml"),
    _broken("override_of_unknown_field", "run.setps=5"),
    _broken("draft_vocabulary_of_one", "heads.draft_vocabulary=1"),
    _broken("draft_vocabulary_that_is_a_list", "heads.draft_vocabulary=[1, 2]"),
    _broken("override_of_a_top_level_field_within_a_section", "heads.freeze=[trunk]"),
    _broken("override_below_a_number", "run.steps.max=5"),
    _broken("override_of_a_list_item", "data.corpus.0=src"),
)

NAMES = (
    Case("unknown_field", "heads:\n  num_ofsets: 4\n"),
    Case("unknown_field_far_from_any", "batch:\n  qqq: 4\n"),
    Case("name_within_a_section", "optimizer:\n  name: AdamW\n"),
    Case("top_level_field_within_a_section", "heads:\n  freeze: [trunk]\n"),
    Case("unknown_section", "modle:\n  hidden_size: 64\n"),
    Case("field_of_another_section", "model:\n  seq_len: 64\n"),
    Case("field_outside_its_section", "steps: 5\n"),
    Case("field_with_a_dotted_key", "run.steps: 5\n"),
    Case("field_misspelt_outside_its_section", "seq_lne: 64\n"),
    Case("field_of_another_kind", "objective:\n  weights: {kind: constant, beta: 0.5}\n"),
    Case("unknown_field_of_a_kind", "objective:\n  weights: {kind: decay, bata: 0.5}\n"),
    Case("unknown_kind", "objective:\n  weights: {kind: decya}\n"),
    Case("unknown_kind_of_a_wrong_type", "objective:\n  weights: {kind: [decay]}\n"),
    Case("missing_kind", "objective:\n  weights: {beta: 0.5}\n"),
    Case("kind_alone", "objective:\n  weights: decay\n"),
    Case("missing_fields", "batch:\n  ramp: {from_batch_size: 4}\ndata:\n  stream:\n    text_field: body\n"),
    Case("missing_field_in_other_words", "batch:\n  ramp: {from_batch_size: 4, over_row: 90}\n"),
    Case("unknown_choice", "heads:\n  kind: paralel\n"),
    Case("unknown_choice_far_from_any", "heads:\n  kind: 3\n"),
    Case("unknown_key_of_a_mapping", "optimizer:\n  lr_scale: {haeds: 4}\n"),
)

VALUES = (
    Case("text_for_whole_number", 'model:\n  hidden_size: "192"\n'),
    Case("words_for_whole_number", "model:\n  hidden_size: wide\n"),
    Case("fraction_for_whole_number", "model:\n  hidden_size: 192.5\n"),
    Case("boolean_for_whole_number", "model:\n  hidden_size: true\n"),
    Case("text_for_number", 'optimizer:\n  lr: "3e-4"\n'),
    Case("boolean_for_number", "optimizer:\n  lr: true\n"),
    Case("text_for_boolean", "model:\n  qkv_bias: yes\n"),
    Case("number_for_boolean", "model:\n  qkv_bias: 1\n"),
    Case("number_for_text", "run:\n  dir: 2026\n"),
    Case("boolean_for_text", "name: true\n"),
    Case("null_for_text", "name: null\n"),
    Case("null_for_section", "model:\nrun:\n  steps: 500\n"),
    Case("text_for_section", "model: big\n"),
    Case("number_for_optional_section", "objective:\n  token_order: 3\n"),
    Case("text_for_list", "data:\n  corpus: src\n"),
    Case("number_for_list", "optimizer:\n  betas: 0.9\n"),
    Case("wrong_item_of_list", "data:\n  corpus: [src, 3]\n"),
    Case("wrong_item_of_optional_list", "objective:\n  weights: {kind: constant, values: [1, -1, 1, 1]}\n"),
    Case("empty_list", "data:\n  corpus: []\n"),
    Case("list_too_short", "optimizer:\n  betas: [0.9]\n"),
    Case("empty_list_of_words", "adapt:\n  lora: {targets: []}\n"),
    Case("wrong_word_in_a_list", "adapt:\n  lora: {targets: [q, value]}\n"),
    Case("unknown_part_to_freeze", "freeze: [trnk, offsets_below_two]\n"),
    Case("list_for_mapping", "optimizer:\n  lr_scale: [1, 4]\n"),
    Case("wrong_entry_of_mapping", "optimizer:\n  lr_scale: {heads: 0}\n"),
    Case("text_for_free_mapping", "strategy:\n  deepspeed: fast\n"),
    Case("mapping_for_number", "run:\n  steps: {max: 5}\n"),
    Case("below_bound", "run:\n  steps: 0\n"),
    Case("above_bound", "data:\n  validation_fraction: 1.0\n"),
    Case("below_bound_in_optional_section", "objective:\n  token_order: {weight: 0}\n"),
    _broken("distillation_with_negative_weight", "objective.distill={beta: [-0.5]}"),
    _broken("unknown_divergence", "objective.distill={divergence: kl}"),
    _broken("seed_too_large", "run.seed=4294967296"),
    _broken("enormous_width", "model.hidden_size=99999999999999999999999999"),
    _broken("section_that_is_null_by_default", "batch.ramp.from_batch_size=0"),
    _broken("name_that_no_file_system_takes", f"run.dir=runs/{'x' * 300}", f"data.corpus=[{'y' * 256}, 'a*']"),
    _broken("half_a_character", r'run.dir="\uD800"'),
    _broken("section_or_word", "health.drift.samples=1"),
    _broken("neither_section_nor_word", "health.drift=x"),
    _broken("list_of_phases", "phases=[a, b]"),
    _broken("date_for_text", "name=2024_10_01"),
    _broken("number_too_small_for_any_machine", "optimizer.lr=1e-320"),
    _broken("number_too_large_for_any_machine", "optimizer.max_grad_norm=1e308"),
    _broken("more_loaders_than_any_machine", "data.workers=1000"),
    Case("not_a_number", "optimizer:\n  lr: .nan\n"),
    Case("infinite_number", "optimizer:\n  lr: 1e999\n"),
)

RULES = (
    _broken("width_not_divisible", "model.hidden_size=30"),
    _broken("key_value_heads_do_not_divide", "model.num_key_value_heads=3"),
    _broken("run_folder_in_no_place", 'run.dir=""'),
    _broken("run_folder_behind_a_url", "run.dir=s3://bucket/run"),
    _broken("run_folder_of_an_unknown_user", "run.dir=~nobody-by-this-name/runs/x"),
    _broken("run_folder_of_a_long_name", f"run.dir=runs/{'x' * 300}"),
    _broken("shards_in_a_variable", "data.shards=s3://$UNSET_BUCKET/shards"),
    _broken("start_in_a_variable", "init.path=$UNSET_SCRATCH/base"),
    _broken("cache_in_a_variable", "run.cache=$UNSET_SCRATCH/cache"),
    _broken("head_width_odd", "model.head_dim=31"),
    _broken("head_width_odd_by_division", "model.hidden_size=24", "model.num_attention_heads=8"),
    _broken("rotary_share_of_an_odd_width", "model.partial_rotary_factor=0.1"),
    _broken("rope_turns_swapped", "model.rope_scaling={kind: yarn, beta_slow: 40}"),
    _broken("offload_of_nothing", "memory.offload_activations=true"),
    _broken("ntk_of_one_pair", "model.rope_scaling={kind: ntk}", "model.head_dim=2"),
    _broken("rope_factors_swapped", "model.rope_scaling={low_freq_factor: 4, high_freq_factor: 1}"),
    _broken("no_layer_for_the_trunk", "model.num_hidden_layers=4"),
    _broken(
        "no_layer_for_the_trunk_beside_the_main_head", "model.num_hidden_layers=1", "heads.layers_from_trunk=false"
    ),
    _broken("no_layer_for_the_trunk_of_modules", "heads.kind=sequential", "model.num_hidden_layers=3"),
    _broken("order_without_chain", "heads.order=anticausal"),
    _broken("hidden_without_modules", "heads.hidden=pre_norm"),
    _broken("concatenation_without_modules", "heads.concatenation=hidden_first"),
    _broken("layers_per_linear_head", "heads.kind=linear", "heads.layers_per_head=2"),
    _broken("isolated_anticausal_chain", "heads.kind=chained", "heads.order=anticausal", "heads.detach_trunk=true"),
    _broken("nothing_left_to_train", "freeze=[offsets_below_5]"),
    _broken("frozen_part_of_a_recursive_module", "freeze=[offsets_below_3]", "heads.kind=recursive"),
    _broken("frozen_main_head_with_token_order", "freeze=[offsets_below_2]", "objective.token_order={}"),
    _broken("draft_vocabulary_larger_than_the_vocabulary", "heads.draft_vocabulary=258"),
    _broken("draft_vocabulary_of_one_offset", "heads.draft_vocabulary=40", "heads.num_offsets=1"),
    _broken("draft_vocabulary_of_a_stream", "heads.draft_vocabulary=40", *STREAM),
    _broken("draft_ids_that_are_none", "heads.draft_vocabulary=2", "heads.draft_token_ids=x"),
    _broken("draft_ids_of_another_number", "heads.draft_vocabulary=3", "heads.draft_token_ids=BQ=="),
    _broken("draft_ids_without_a_draft_vocabulary", "heads.draft_token_ids=BQ=="),
    _broken("top_k_above_the_draft_vocabulary", "heads.draft_vocabulary=40", "objective.distill={top_k: 41}"),
    _broken("replicated_and_tied", "heads.unembedding=replicated", "model.tie_word_embeddings=true"),
    _broken("replicated_modules", "heads.unembedding=replicated", "heads.kind=recursive"),
    _broken("too_few_weights", "objective.weights={kind: constant, values: [1, 1]}"),
    _broken("main_head_without_weight", "objective.weights={kind: constant, values: [0, 1, 1, 1]}"),
    _broken("interval_backward", "objective.weights={kind: lambda, change: linear, begins_at: 0.5, ends_at: 0.2}"),
    _broken("distillation_of_one_offset", "objective.distill={}", "heads.num_offsets=1"),
    _broken("distillation_with_too_many_weights", "objective.distill={alpha: [1, 1], beta: [1, 1, 1, 1]}"),
    _broken("distillation_that_teaches_nothing", "objective.distill={alpha: [1, 0, 1], beta: [0]}"),
    _broken("distillation_of_more_than_the_vocabulary", "objective.distill={top_k: 300}"),
    _broken("rollout_of_a_kind_without_tokens", "objective.rollout={}"),
    _broken("rollout_without_a_far_offset", "objective.rollout={}", "heads.kind=recursive", "heads.num_offsets=2"),
    _broken("rollout_that_starts_and_does_not_change", "objective.rollout={start: 0.5}", "heads.kind=sequential"),
    _broken("distillation_and_balance", "objective.distill={}", "objective.balance=rms"),
    _broken("unknown_tokenizer", "data.tokenizer=bytes"),
    _broken("end_of_document_of_bytes", "data.end_of_document=3"),
    _broken("special_tokens_of_bytes", "data.parse_special_tokens=true"),
    _broken("mixture_beside_shards", "data.mixture={web: 1}", "data.shards=code"),
    _broken("mixture_with_a_tiny_weight", "data.mixture={web: 1, code: 1e-4}"),
    _broken(
        "schedule_of_another_source",
        "data.mixture={web: 1}",
        "data.mixture_schedule={at_rows: [0], weights: {code: [1]}}",
    ),
    _broken("schedule_of_no_source", "data.mixture_schedule={at_rows: [0], weights: {}}"),
    _broken(
        "schedule_that_goes_back",
        "data.mixture={web: 1}",
        "data.mixture_schedule={at_rows: [0, 9, 9], weights: {web: [1, 1, 1]}}",
    ),
    _broken(
        "schedule_with_too_few_weights",
        "data.mixture={web: 1}",
        "data.mixture_schedule={at_rows: [0, 9], weights: {web: [1]}}",
    ),
    _broken(
        "schedule_without_any_weight",
        "data.mixture={web: 1, code: 2}",
        "data.mixture_schedule={at_rows: [0, 9], weights: {web: [1, 0], code: [1, 0]}}",
    ),
    _broken(
        "schedule_of_a_source_that_is_never_read",
        "data.mixture={web: 1, code: 2}",
        "data.mixture_schedule={at_rows: [0, 9], weights: {web: [0, 0]}}",
    ),
    _broken("stream_without_its_kind", "data.stream={train: [a.tar], validation: [b.tar]}"),
    _broken("stream_in_an_order", *STREAM, "data.shuffle=shards"),
    _broken("template_without_fields", "data.template=no fields"),
    _broken("encoding_that_is_none", "data.encoding=latin-99"),
    _broken("text_field_beside_a_template", "data.text_field=a", "data.template='{a}'"),
    _broken("packed_shards_from_a_url", "data.shards=s3://bucket/shards", "data.packing=best_fit"),
    _broken(
        "ramp_that_does_not_divide_rows",
        "batch.micro_batch_size=1",
        "batch.ramp={from_batch_size: 3, over_samples: 90}",
    ),
    _broken(
        "ramp_that_ranks_cannot_share", "batch.micro_batch_size=4", "batch.ramp={from_batch_size: 2, over_samples: 90}"
    ),
    _broken(
        "ramp_of_too_many_sizes",
        "batch.global_batch_size=1000000",
        "batch.micro_batch_size=1",
        "batch.ramp={from_batch_size: 1, over_samples: 90}",
    ),
    _broken("epochs_of_another_source", "data.mixture={web: 1}", "data.max_epochs={code: 2}"),
    _broken("window_as_short_as_offsets", "data.seq_len=4"),
    _broken("window_beyond_positions", "data.seq_len=5000"),
    _broken("micro_rows_do_not_divide", "batch.global_batch_size=12", "batch.micro_batch_size=8"),
    _broken("betas_out_of_range", "optimizer.betas=[0.9, 1.0]"),
    _broken("muon_settings_without_muon", "optimizer.muon={momentum: 0.9}"),
    _broken(
        "adafactor_under_zero",
        *("optimizer.kind=adafactor", "strategy.kind=zero2", "optimizer.betas=[0.9, 0.99]"),
    ),
    _broken("adafactor_settings_without_adafactor", "optimizer.adafactor={clip_threshold: 2.0}"),
    _broken(
        "width_scaling_that_is_not_defined",
        *("optimizer.mup_base_width=128", "optimizer.kind=muon", "model.tie_word_embeddings=true", "adapt.lora={}"),
    ),
    _broken("decay_without_wsd", "optimizer.decay_fraction=0.1", "optimizer.decay_shape=linear"),
    _broken("second_warm_up_after_the_run", "optimizer.rewarm_at=1000"),
    _broken("second_warm_up_within_the_first", "optimizer.rewarm_at=99"),
    _broken("average_after_the_run", "optimizer.ema={from_step: 1000}"),
    _broken(
        "average_and_muon_with_offloading",
        *("strategy.kind=zero2", "strategy.offload_optimizer=cpu", "optimizer.ema={}", "optimizer.kind=muon"),
    ),
    _broken("profile_after_the_run", "debug.profile_steps=[999, 1001]"),
    _broken("guard_without_a_start", "health.drift={}"),
    _broken("optimizer_kept_without_a_start", "init.optimizer=true", "init.data_position=true", "heads.extend=3"),
    _broken("trains_nothing", "freeze=[offsets_below_3]", "objective.weights={kind: constant, values: [1, 1, 0, 0]}"),
    _broken(
        "trains_nothing_for_a_while",
        "heads.kind=medusa",
        "freeze=[trunk, unembedding]",
        "objective.weights={kind: curriculum}",
    ),
    _broken("ranks_do_not_divide_rows", "strategy.kind=zero2", "strategy.ranks_per_node=6", "batch.micro_batch_size=1"),
    _broken("micro_rows_of_all_ranks_do_not_divide_rows", "strategy.kind=zero3", "strategy.num_nodes=2"),
    _broken("several_ranks_without_zero", "strategy.ranks_per_node=4"),
    _broken("slices_do_not_divide_ranks", "strategy.kind=zero2", "strategy.sequence_parallel=2"),
    _broken("slices_do_not_divide_heads", *TWO_SLICES, "model.num_attention_heads=5", "model.hidden_size=320"),
    _broken("slices_do_not_divide_windows", *TWO_SLICES, "data.seq_len=255"),
    _broken("slices_shorter_than_offsets", *TWO_SLICES, "data.seq_len=6"),
    _broken("slices_of_transformers", *TWO_SLICES, *FOREIGN, GPT2),
    _broken("slices_with_a_rollout", *TWO_SLICES, "heads.kind=sequential", "objective.rollout={}"),
    _broken("slices_with_kept_states", *TWO_SLICES, "freeze=[trunk]", "memory.cache_hidden_states=states"),
    _broken("slices_with_token_order", *TWO_SLICES, "objective.token_order={}"),
    _broken("slices_with_balance", *TWO_SLICES, "objective.balance=rms"),
    _broken("slices_of_a_stream", *TWO_SLICES, *STREAM),
    _broken("groups_do_not_divide_rows", *TWO_SLICES, "strategy.ranks_per_node=6", "batch.micro_batch_size=1"),
    _broken("rounded_sums_in_fp32", "strategy.kind=zero2", "strategy.reduce_dtype=bf16"),
    _broken("elastic_without_zero", "strategy.elastic=true"),
    _broken("offload_without_zero", "strategy.offload_optimizer=cpu"),
    _broken("parameters_offloaded_under_zero2", "strategy.kind=zero2", "strategy.offload_parameters=cpu"),
    _broken("nvme_without_path", "strategy.kind=zero3", "strategy.offload_optimizer=nvme"),
    _broken("offload_without_a_gpu", "strategy.kind=zero3", "strategy.offload_parameters=cpu", "run.device=cpu"),
    _broken(
        "deepspeed_keys_of_other_fields",
        "strategy.kind=zero2",
        "strategy.deepspeed={gradient_clipping: 0.5, zero_optimization: {stage: 3, reduce_bucket_size: 5}}",
    ),
    _broken("first_offset_below_two", "freeze=[offsets_below_1]"),
    _broken("everything_frozen", "freeze=[trunk, heads, unembedding]"),
    _broken("gate_of_a_gelu", "adapt.lora={targets: [q, gate]}", "model.mlp=gelu"),
    _broken("target_named_twice", "adapt.lora={targets: [q, v, q]}"),
    _broken("updates_in_heads_without_layers", "adapt.lora={in_heads: true}", "heads.kind=medusa"),
    _broken(
        "dropout_in_a_taught_teacher",
        "adapt.lora={in_heads: true, dropout: 0.1}",
        "objective.distill={detach_teacher: false}",
    ),
    _broken("kept_states_of_a_trained_trunk", "memory.cache_hidden_states=runs/states"),
    _broken("kept_states_under_updates", "memory.cache_hidden_states=s", "freeze=[trunk]", "adapt.lora={}"),
    _broken("mixtures_that_nobody_reads", "adapt.layer_mix={main_head: false}", "heads.kind=sequential"),
    _broken("mixture_of_one_layer", "adapt.layer_mix={}", "model.num_hidden_layers=5"),
    _broken("mixture_of_a_frozen_head", "adapt.layer_mix={}", "freeze=[offsets_below_2]"),
    _broken("mixtures_of_an_isolated_trunk", "adapt.layer_mix={}", "heads.detach_trunk=true"),
    _broken(
        "settings_without_their_family",
        GPT2,
    ),
    _broken("tiles_of_a_foreign_model", *FOREIGN, GPT2, "memory.mlp_tile=512"),
    _broken("liger_in_the_joint_order", "memory.loss_kernel=liger", "objective.backward_order=joint"),
    _broken("liger_with_balance", "memory.loss_kernel=liger", "objective.balance=rms"),
    _broken("liger_with_a_teacher", "memory.loss_kernel=liger", "objective.distill={}"),
    _broken("liger_with_a_rollout", "memory.loss_kernel=liger", "heads.kind=sequential", "objective.rollout={}"),
    _broken("liger_in_fp16", "memory.loss_kernel=liger", "run.precision=fp16", "strategy.kind=zero2"),
    _broken("family_transformers_without_settings", *FOREIGN),
    _broken(
        "settings_without_a_size",
        "model.family=transformers",
        "heads.layers_from_trunk=false",
        "model.hf_config={model_type: gpt2, n_embd: 32}",
    ),
    _broken(
        "settings_that_a_field_contradicts",
        "model.family=transformers",
        "heads.layers_from_trunk=false",
        GPT2,
        "model.hidden_size=64",
    ),
    _broken(
        "settings_beside_a_field_of_own_trunks",
        "model.family=transformers",
        "heads.layers_from_trunk=false",
        GPT2,
        "model.rope_theta=5e5",
    ),
    _broken("width_scaling_beside_settings", *FOREIGN, GPT2, "optimizer.mup_base_width=128"),
    _broken("rollout_of_two_streams_beside_settings", *FOREIGN, GPT2, "heads.kind=sequential", "objective.rollout={}"),
    _broken(
        "settings_and_layers_from_the_trunk",
        "model.family=transformers",
        GPT2,
    ),
    _broken("fp16_without_zero", "run.precision=fp16"),
    _broken("fp16_on_the_cpu", "run.precision=fp16", "strategy.kind=zero1", "run.device=cpu"),
)

PHASES = (
    Case(
        "phases_with_faults_of_their_own",
        "phases:\n"
        "  all/heads:\n    run: {steps: 0}\n"
        "  second:\n    keep_optimizer: true\n    heads:\n      num_offsets: 8\n    freeze: [offsets_below_9]\n"
        "  third:\n    optimizer:\n      lrr: 1\n",
    ),
    Case(
        "phases_that_do_not_fit_each_other",
        "heads: {num_offsets: 2, kind: sequential}\nphases:\n"
        "  heads:\n    keep_optimizer: true\n    freeze: [offsets_below_2]\n"
        "  joint:\n    keep_optimizer: true\n"
        "  eight:\n    extend_to: 8\n    keep_optimizer: true\n"
        "  three:\n    extend_to: 3\n"
        "  trains_nothing:\n    freeze: [offsets_below_2]\n"
        "    objective: {weights: {kind: lambda, start: 0, end: 0}}\n",
    ),
    Case(
        "phase_that_loses_updates",
        "phases:\n  joint:\n    adapt: {lora: {rank: 4}}\n  larger:\n    adapt: {lora: {rank: 8}}\n  none: {}\n",
    ),
    Case("phase_with_a_foreign_section", "phases:\n  third:\n    model: {hidden_size: 8}\n"),
    Case("phases_that_cannot_chain", "phases:\n  eight:\n    extend_to: 8\n"),
    Case(
        "phases_extended_beyond_the_window",
        "heads: {num_offsets: 2, kind: sequential}\ndata: {seq_len: 8}\nphases:\n  eight: {extend_to: 8}\n",
    ),
)

TOGETHER = (
    Case(
        "all_together",
        "extends: base.yaml\nheads:\n  num_ofsets: 4\nmodel:\n  hidden_size: 30\nbatch:\n  global_batch_size: '16'\n",
        ("run.steps", "data.seq_len=4"),
        {"base.yaml": "run:\n  seed: -1\n  seed: 2\n"},
    ),
)

SCHEDULES = (
    _broken("warm_up_and_decay_longer_than_the_run", "optimizer.schedule=wsd", "optimizer.decay_fraction=0.95"),
)

CASES = (*FILES, *OVERRIDES, *NAMES, *VALUES, *RULES, *PHASES, *SCHEDULES, *TOGETHER)
