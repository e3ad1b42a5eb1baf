"""Megatron-LM's options of pretrain_gpt.py and what stands for them here: the one table behind `illada translate`, the
hints at unknown fields and options, and docs/from_megatron.md. What its tools take stands in `megatron_tools.py`.

Read in Megatron-LM's megatron/training/arguments.py and megatron/training/config/, as of July 2024 and August 2026.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

Kind = Literal["flag", "int", "float", "text", "list", "any"]
Group = Literal["not needed here", "not supported", "contradicts masked diffusion"]
_UNSET = object()


@dataclass(frozen=True)
class Option:
    """An option of pretrain_gpt.py."""

    name: str
    """Without a field also a pattern: `--moe-*`."""
    kind: Kind = "any"
    field: str | None = None
    """`section.field` that says the same here. Where the schema has none of this name, `group` holds."""
    note: str = ""
    computed: bool = False
    """The value is not taken as it is: config/megatron_translation.py."""
    default: Any = _UNSET
    """Megatron's, where it differs from the field's: what is written without the option."""
    group: Group = "not supported"

    @property
    def has_default(self) -> bool:
        return self.default is not _UNSET


_FIELDS = [
    Option("--num-layers", "int", "model.num_layers"),
    Option("--hidden-size", "int", "model.hidden_size"),
    Option(
        "--ffn-hidden-size", "int", "model.ffn_hidden_size", "without it 8/3 of hidden_size, as with --swiglu", True
    ),
    Option("--num-attention-heads", "int", "model.num_attention_heads"),
    Option("--group-query-attention", "flag", "model.num_query_groups", "without it num_attention_heads", True),
    Option("--num-query-groups", "int", "model.num_query_groups", "counts with --group-query-attention only", True),
    Option("--kv-channels", "int", "model.kv_channels"),
    Option("--max-position-embeddings", "int", "model.max_sequence_length", "without it --seq-length", True),
    Option("--rotary-base", "float", "model.rotary_base", default=10000.0),
    Option("--norm-epsilon", "float", "model.norm_epsilon"),
    Option("--layernorm-epsilon", "float", "model.norm_epsilon"),
    Option("--add-qkv-bias", "flag", "model.add_qkv_bias"),
    Option("--untie-embeddings-and-output-weights", "flag", "model.tie_word_embeddings", "false; else true", True),
    Option("--init-method-std", "float", "model.init_method_std"),
    Option("--embedding-init-method-std", "float", "model.embedding_init_std", "without it --init-method-std's", True),
    Option("--make-vocab-size-divisible-by", "int", "model.make_vocab_size_divisible_by", "not times TP, as there"),
    Option("--vocab-size", "int", "model.vocab_size", "the tokenizer's where its file is there; with a mask", True),
    Option("--qk-layernorm", "flag", "model.qk_layernorm", "queries and keys have no norm"),
    Option("--use-rope-scaling", "flag", "model.rope_scaling", "Llama 3.1's scaling of rotary frequencies", True),
    Option("--rope-scaling-factor", "float", "model.rope_scaling", "of --use-rope-scaling", True),
    Option("--swiglu", "flag", "model", "always so", True),
    Option("--normalization", "text", "model", "always RMSNorm", True),
    Option("--disable-bias-linear", "flag", "model", "always so", True),
    Option("--position-embedding-type", "text", "model", "always rope", True),
    Option("--use-rotary-position-embeddings", "flag", "model", "always so", True),
    Option("--attention-dropout", "float", "model", "always 0", True),
    Option("--hidden-dropout", "float", "model", "always 0", True),
    Option("--tensor-model-parallel-size", "int", "parallel.tensor_model_parallel_size"),
    Option("--pipeline-model-parallel-size", "int", "parallel.pipeline_model_parallel_size"),
    Option(
        "--num-layers-per-virtual-pipeline-stage",
        "int",
        "parallel.virtual_pipeline_model_parallel_size",
        "num_layers / (pipeline size * this)",
        True,
    ),
    Option("--num-virtual-stages-per-pipeline-rank", "int", "parallel.virtual_pipeline_model_parallel_size"),
    Option("--pipeline-model-parallel-layout", "text", "parallel.pipeline_layout", "with its virtual stages", True),
    Option("--decoder-first-pipeline-num-layers", "int", "parallel.pipeline_layout", "in its notation", True),
    Option("--decoder-last-pipeline-num-layers", "int", "parallel.pipeline_layout", "in its notation", True),
    Option("--account-for-embedding-in-pipeline-split", "flag", "parallel.pipeline_layout", "in its notation", True),
    Option("--account-for-loss-in-pipeline-split", "flag", "parallel.pipeline_layout", "in its notation", True),
    Option("--context-parallel-size", "int", "parallel.context_parallel_size"),
    Option("--sequence-parallel", "flag", "parallel.sequence_parallel", "left out where TP is 1, as there", True),
    Option("--use-distributed-optimizer", "flag", "parallel.use_distributed_optimizer", default=False),
    Option("--overlap-grad-reduce", "flag", "parallel.overlap_grad_reduce"),
    Option("--overlap-param-gather", "flag", "parallel.overlap_param_gather"),
    Option("--ddp-bucket-size", "int", "parallel.ddp_bucket_size", "counts with --overlap-grad-reduce only", True),
    Option("--tp-comm-overlap", "flag", "parallel.tp_comm_overlap", "with --sequence-parallel, TP > 1 and bf16", True),
    Option(
        "--grad-reduce-in-bf16",
        "flag",
        "parallel.grad_reduce_in_bf16",
        "summed in fp32; with --use-distributed-optimizer only",
        True,
    ),
    Option(
        "--ddp-average-in-collective", "flag", "parallel.ddp_average_in_collective", "not with bf16 gradients", True
    ),
    Option(
        "--ddp-pad-buckets-for-high-nccl-busbw",
        "flag",
        "parallel.ddp_pad_buckets_for_high_nccl_busbw",
        "with --use-distributed-optimizer only",
        True,
    ),
    Option("--distributed-timeout-minutes", "float", "runtime.distributed_timeout_minutes"),
    Option("--transformer-impl", "text", "runtime.transformer_impl"),
    Option("--data-path", "list", "data.train_paths", "with weights, `0.3 a 0.7 b`: data.blend", True),
    Option("--train-data-path", "list", "data.train_paths", "with weights: data.blend", True),
    Option("--valid-data-path", "list", "data.validation_paths", "one corpus: weights are left out", True),
    Option("--split", "text", "data.holdout_tokens", "of each corpus, as many tokens as validation reads", True),
    Option("--seq-length", "int", "data.sequence_length"),
    Option("--num-workers", "int", "data.loader_threads", "at least 1", True),
    Option("--reset-attention-mask", "flag", "diffusion.attention_boundary", "document", True),
    Option("--dataloader-inter-document-masking", "flag", "diffusion.attention_boundary", "document", True),
    Option("--tokenizer-type", "text", "data.tokenizer_path", "see Tokenizers", True),
    Option("--tokenizer-model", "text", "data.tokenizer_path", "", True),
    Option("--vocab-file", "text", "data.tokenizer_path", "with --merge-file: what preprocessing makes of them", True),
    Option("--merge-file", "text", "data.tokenizer_path", "", True),
    Option("--micro-batch-size", "int", "training.micro_batch_size"),
    Option("--global-batch-size", "int", "training.global_batch_size", "without it micro-batch * DP", True),
    Option("--rampup-batch-size", "list", "training.rampup_batch_size", "", True),
    Option("--step-batch-size-schedule", "text", "training.rampup_batch_size", "where all its steps are alike", True),
    Option("--train-iters", "int", "training.train_steps"),
    Option("--train-samples", "int", "training.train_steps", "/ global batch, the ramp-up counted", True),
    Option("--exit-interval", "int", "training.exit_steps", "this step alone, not its multiples"),
    Option("--seed", "int", "training.seed"),
    Option("--deterministic-mode", "flag", "training.deterministic"),
    Option("--bf16", "flag", "training.precision", "bf16; without it and --fp16 fp32", True),
    Option("--fp16", "flag", "training.precision", "bf16: there is no fp16", True),
    Option("--fp8-format", "text", "training.precision", "fp8; the recipe has one format here", True),
    Option("--fp8-recipe", "text", "fp8.recipe", "with --fp8-format, as all of FP8; without it delayed", True),
    Option("--fp8-param-gather", "flag", "fp8.param_gather", "not with mxfp8", True),
    Option("--first-last-layers-bf16", "flag", "fp8.num_layers_at_start_in_bf16", "1 each; without it 0", True),
    Option("--num-layers-at-start-in-bf16", "int", "fp8.num_layers_at_start_in_bf16", "with the former", True),
    Option("--num-layers-at-end-in-bf16", "int", "fp8.num_layers_at_end_in_bf16", "with the former", True),
    Option("--fp8-amax-history-len", "int", "fp8.amax_history_len", "1 without it", True),
    Option("--fp8-amax-compute-algo", "text", "fp8.amax_compute_algo", "most_recent without it", True),
    Option("--recompute-granularity", "text", "training.recompute"),
    Option("--recompute-activations", "flag", "training.recompute", "selective", True),
    Option("--checkpoint-activations", "flag", "training.recompute", "full", True),
    Option("--lr", "float", "training.lr"),
    Option("--min-lr", "float", "schedule.min_lr"),
    Option("--lr-decay-style", "text", "schedule.decay_style", "decay_start is the end of the warm-up", True),
    Option("--lr-decay-iters", "int", "schedule.decay_steps", "less the warm-up", True),
    Option("--lr-decay-samples", "int", "schedule.decay_steps", "in steps, less the warm-up", True),
    Option("--lr-wsd-decay-style", "text", "schedule.decay_style", "", True),
    Option("--lr-wsd-decay-iters", "int", "schedule.decay_start", "the decay's end less these", True),
    Option("--lr-wsd-decay-samples", "int", "schedule.decay_start", "the decay's end less these, in steps", True),
    Option("--lr-warmup-iters", "int", "schedule.warmup_steps", "0 without it", True),
    Option("--lr-warmup-samples", "int", "schedule.warmup_steps", "in steps", True),
    Option("--lr-warmup-fraction", "float", "schedule.warmup_steps", "of the decay's end", True),
    Option("--weight-decay", "float", "optimizer.weight_decay", default=0.01),
    Option("--adam-beta1", "float", "optimizer.adam_beta1"),
    Option("--adam-beta2", "float", "optimizer.adam_beta2", default=0.999),
    Option("--adam-eps", "float", "optimizer.adam_eps"),
    Option("--clip-grad", "float", "optimizer.clip_grad"),
    Option("--save", "text", "checkpoint.save_dir"),
    Option("--load", "text", "checkpoint.load_dir", "nothing where it is --save's: a run continues itself", True),
    Option("--save-interval", "int", "checkpoint.interval_steps"),
    Option("--persistent-save-interval", "int", "checkpoint.interval_steps"),
    Option("--save-retain-interval", "int", "checkpoint.keep_every", "with checkpoint.keep_last 1", True),
    Option("--async-save", "flag", "checkpoint.asynchronous", "true without it too"),
    Option("--eval-interval", "int", "validation.interval_steps", "", True),
    Option("--eval-iters", "int", "validation.num_samples", "times the global batch; the same samples each time", True),
    Option("--log-interval", "int", "logging.interval_steps", default=100),
    Option("--tensorboard-dir", "text", "logging.tensorboard_dir"),
    Option("--wandb-project", "text", "logging.wandb_project", "with run_dir, which keeps the run's id there"),
]

# why -> names and patterns
_NONE: dict[Group, dict[str, str]] = {
    "not needed here": {
        "there is none to leave out: positions are rotary": "--no-position-embedding",
        "the norm's weight is stored as it is: the same function": "--apply-layernorm-1p",
        "how ranks talk is megatron-core's and this program's to choose": """
            --accumulate-allreduce-grads-in-fp32 --no-async-tensor-model-parallel-allreduce
            --no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush --no-delay-grad-reduce
            --delay-param-gather --no-align-* --no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p
            --ddp-num-buckets --ddp-reduce-scatter-* --overlap-param-gather-with-optimizer-step --use-nccl-ub
            --disable-symmetric-registration --use-sharp --sharp-enabled-group --nccl-communicator-config-path
            --use-tp-pp-dp-mapping --high-priority-stream-groups --disable-gloo-process-groups
            --distributed-backend --lazy-mpu-init --local-rank --flight-recorder-*
            --distributed-timeout-seconds-after-init --defer-embedding-wgrad-compute --wgrad-deferral-limit
            --no-batch-p2p-* --no-flight-recorder-*
            --microbatch-group-size-per-* --suggested-communication-* --gtp-* --no-use-layer-wise-*
        """,
        "rotary positions count by their differences only": "--reset-position-ids",
        "no index is built before a run: a sample's place is computed": """
            --data-cache-path --no-mmap-bin-files --num-dataset-builder-threads --dataloader-fast-cache-load
            --dataloader-defer-npy-index-mmap --mid-level-dataset-surplus --object-storage-cache-path
            --enable-msc --disable-msc --per-dataset-sequences-path --no-data-sharding --allow-ambiguous-pad-tokens
        """,
        "the vocabulary is padded to model.make_vocab_size_divisible_by": "--no-pad-vocab-size --padded-vocab-size",
        "preprocessing takes the fastest library that agrees": "--use-gigatoken",
        "weight decay is constant": "--weight-decay-incr-style",
        "full makes each layer again, selective the attention core": """
            --recompute-method --recompute-num-layers --recompute-modules
        """,
        "bf16 needs no loss scale": """
            --loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis
            --fp16-lm-cross-entropy
        """,
        "always: the sum over the tokens of the global batch": "--calculate-per-token-loss",
        "loss.implementation chooses": "--cross-entropy-loss-fusion --cross-entropy-fusion-impl",
        "a schedule is what the configuration says, also on resume": """
            --override-opt-param-scheduler --use-checkpoint-opt-param-scheduler
        """,
        "training.pad_global_batch keeps the batch": "--decrease-batch-size-if-needed",
        "no random state is saved or loaded": "--no-save-rng --no-load-rng",
        "a checkpoint has one format, fits any layout and is verified; Megatron's: `illada checkpoint reshard`": """
            --ckpt-* --dist-ckpt-* --use-dist-ckpt --auto-detect-ckpt-format --no-ckpt-* --use-checkpoint-args
            --use-mp-args-from-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args
            --exit-on-missing-checkpoint --async-strategy --async-ckpt-* --use-persistent-ckpt-worker
            --non-persistent-* --replication* --verify-integrity --no-strict-fsdp-dtensor-load
            --no-save-tokenizer-assets --load-main-params-from-ckpt
            --distrib-optim-fully-reshardable-mem-efficient
        """,
        "a run saves and ends on SIGTERM, as Slurm sends it before a time limit (--signal=TERM@120)": """
            --exit-duration-in-mins --exit-signal*
        """,
        "bad steps, slow, stuck and dead ranks are seen to: faults.*": """
            --no-check-for-nan-in-loss-and-grad --check-for-* --rerun-* --error-injection-* --log-straggler
            --straggler-* --disable-straggler-on-startup --enable-ft-package --calc-ft-timeouts --ft-*
            --inprocess-* --adlr-autoresume* --run-workload-inspector-server --result-rejected-*
            --check-weight-hash-* --gpu-sniff-test-interval --train-sync-interval --fault-* --enable-fault-*
        """,
        "what is logged is fixed: docs/training.md": """
            --log-* --no-log-* --disable-log-* --tensorboard-log-interval --tensorboard-queue-size --timing-log-*
            --logging-level --no-barrier-with-level-1-timing --no-one-logger --one-logger-* --enable-one-logger
            --app-tag-* --otel-* --save-*-interval --config-logger-dir --dump-param-to-param-group-map
            --output-logit-dtype
        """,
        "layers and kernels are chosen by what the machine has, and weights by (seed, name): docs/architecture.md": """
            --use-mcore-models --use-legacy-models --use-flash-attn --attention-backend
            --flash-attention-version --no-*-fusion --no-persist-layer-norm --attention-softmax-in-fp32
            --empty-unused-memory-level --manual-gc* --no-manual-gc-eval --use-cpu-initialization
            --init-model-with-* --no-initialization --te-rng-tracker
            --inference-rng-tracker --disable-jit-fuser --enable-cuda-graph --external-cuda-graph --cuda-graph-*
            --use-transformer-engine-op-fuser --use-te-* --no-clone-scatter-output-in-embedding
            --memory-efficient-layer-norm --bias-* --test-mode --use-kitchen* --kitchen-* --batch-invariant-*
            --disable-parameter-transpose-cache --fake-process-group
        """,
        "validation is one corpus, from the first step on": """
            --full-validation --start-eval-at-iter --multiple-validation-sets --validation-set-names
        """,
        "`illada generate` is apart from training": """
            --inference-* --max-tokens-to-oom --output-bert-embeddings --flash-decode --use-legacy-static-engine
            --decode-only-cuda-graphs --enable-chunked-prefill --symmetric-ar-type --nccl-all-reduce-for-prefill
            --mlp-chunks-for-*
        """,
    },
    "not supported": {
        "all dimensions of a head are rotated": "--rotary-percent",
        "a head is rotated in halves, as Llama's": "--rotary-interleaved",
        "other RoPE": "--rotary-seq-len-interpolation-factor --yarn-* --no-yarn-* --rope-type --no-rope-freq --mrope-*",
        "the block is Llama's: SwiGLU, RMSNorm before, plain attention": """
            --squared-relu --openai-gelu --quick-geglu --apply-residual-connection-post-layernorm --qk-l2-norm
            --qk-clip* --apply-query-key-layer-scaling --attention-output-gate --softmax-scale --softmax-type
            --glu-linear-offset --activation-func-clamp-value
        """,
        "each token sees its whole segment": "--window-size --window-attn-skip-freq",
        "weights are drawn from N(0, std)": "--init-method-xavier-uniform --use-mup --mup-*",
        "no experts": """
            --num-experts --num-moe-experts --moe-* --expert-* --enable-expert-* --overlap-moe-* --use-grouped-gemm-*
            --high-priority-a2a-* --ep-overlap-* --delay-wgrad-compute
        """,
        "another architecture": """
            --multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim
            --v-head-dim --rotary-scaling-factor --mscale* --cache-mla-latents --mla-* --dsa-* --linear-*
            --experimental-attention-* --mamba-* --hybrid-* --is-hybrid-model --gdp-* --gdn-* --heterogeneous-*
            --mhc-* --enable-mhc-connections --enable-experimental --spec --yaml-cfg
        """,
        "keys and values go round a ring (p2p), or are gathered where there is no Transformer Engine": """
            --hierarchical-context-parallel-sizes --cp-comm-type
        """,
        "each stage has a layer, and there is no encoder": """
            --standalone-embedding-stage --pipeline-model-parallel-split-rank
        """,
        "the optimizer's state is divided (ZeRO-1), gradients and weights are not": """
            --use-megatron-fsdp --use-torch-fsdp2 --data-parallel-sharding-strategy --outer-dp-* --fsdp-*
            --torch-fsdp2-* --megatron-fsdp-* --num-distributed-optimizer-instances --create-all-gather-group
        """,
        "of tp_comm_overlap all parts, over NCCL": "--tp-comm-* --no-tp-comm-* --disable-tp-comm-*",
        "there is no test set; `illada evaluate` measures on validation data": "--test-data-path",
        "write the paths into data.blend": "--data-args-path --per-split-data-args-path",
        "write data.phases: later weights of the blend": "--phase-transition-iterations",
        "make a corpus: `illada preprocess`, or examples/demo": "--mock-data",
        "samples come in the order of their index": "--dataloader-type",
        "a tokenizer is what its file says": """
            --tokenizer-metadata --tokenizer-special-tokens --tiktoken-* --vocab-extra-ids
            --tokenizer-sentencepiece-* --tokenizer-hf-* --trust-remote-code --null-tokenizer-* --chat-template
        """,
        "`illada preprocess --chat` makes data for SFT; RL and distillation are not here": """
            --sft --sft-* --rl-* --grpo-* --langrl-* --perform-rl-step --logits-* --freeze-all-layers
        """,
        "AdamW only": "--optimizer --sgd-momentum --muon-* --lion-*",
        "all parameters have one rate": "--decoupled-lr --decoupled-min-lr",
        "the warm-up begins at 0": "--lr-warmup-init",
        "weight decay is constant; norms have none": """
            --start-weight-decay --end-weight-decay --apply-wd-to-qk-layernorm --no-weight-decay-cond-type
        """,
        "of FP8 the linear layers' products, all three of them, by the recipes of fp8.*": """
            --fp8-* --fp4-* --te-precision-* --no-fp8-wgrad --activation-func-fp8-* --keep-fp8-* --reuse-grad-buf-*
            --tp-only-amax-red
        """,
        "costs or saves memory; of the optimizer's state Adam's moments may be bf16: optimizer.moments_dtype": """
            --use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-*
            --optimizer-cpu-offload --optimizer-offload-fraction --optimizer-cuda-graph --cpu-offloading*
            --fine-grained-* --offload-modules --activation-offload-fraction
            --delay-offload-* --delta-offload-* --min-offloaded-* --no-pin-cpu-* --overlap-cpu-optimizer-*
            --use-torch-optimizer-* --fp32-residual-connection --distribute-saved-activations
        """,
        "bad steps are skipped by themselves: faults.*": "--iterations-to-skip",
        "begin from weights alone: `illada convert`, `illada checkpoint average`": "--no-load-optim --no-save-optim",
        "`illada evaluate --checkpoint`": "--skip-train --eval-global-batch-size --eval-micro-batch-size",
        "Weights & Biases reads its own environment: WANDB_ENTITY, WANDB_NAME, WANDB_DIR": "--wandb-*",
        "checkpoint.load_dir takes a directory of step_... or one of them": """
            --finetune --pretrained-checkpoint --ckpt-step --override-ckpt-iteration
        """,
        "there is no profiler in the loop": """
            --profile* --use-pytorch-profiler --pytorch-profiler-* --record-* --memory-snapshot-path
            --nvtx-ranges
        """,
        "all ranks begin with the same weights": "--data-parallel-random-init",
        "Megatron has removed it": "--batch-size --warmup --model-parallel-size",
    },
    "contradicts masked diffusion": {
        "there is no causal mask to make: attention goes both ways": """
            --no-create-attention-mask-in-dataloader --create-attention-mask-in-dataloader --attention-mask-type
        """,
        "each token that is masked is predicted, EOD too": "--eod-mask-loss",
        "any gap is filled: that is what the model learns in any case": "--fim-*",
        "there is no next token: all masked positions are predicted at once": "--mtp-* --num-speculative-tokens",
        "the masked share is drawn for each sample: diffusion.*": """
            --mask-prob --short-seq-prob --sample-rate --mask-type --mask-factor
        """,
        "of BERT, T5, RETRO": """
            --encoder-* --decoder-num-layers --decoder-seq-length --retro-* --retriever-* --bert-* --ict-*
            --biencoder-* --relative-attention-* --indexer-* --titles-data-path --evidence-data-path
            --block-data-path --embedding-path --query-in-block-prob --use-one-sent-docs --onnx-safe
        """,
        "text only": """
            --num-classes --img-* --num-channels --patch-dim --classes-fraction --data-per-class-fraction
            --vision-* --swin-* --dino-* --iter-per-epoch --head-lr-mult
        """,
    },
}
HARMLESS = {
    "--rotary-percent": ("1.0", "1"),
    "--num-experts": ("1", "0"),
    "--expert-model-parallel-size": ("1",),
    "--expert-tensor-parallel-size": ("1",),
    "--dataloader-type": ("single", "cyclic"),
    "--vocab-extra-ids": ("0",),
    "--optimizer": ("adam",),
    "--lr-warmup-init": ("0", "0.0"),
    "--weight-decay-incr-style": ("constant",),
}
"""Values with which nothing is missing here."""
REQUIRED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--micro-batch-size", "--lr")
"""Without them, and one of --train-iters and --train-samples, Megatron does not start."""
BYTE_LEVEL_BPE = "--vocab-file and --merge-file, of which preprocessing makes a tokenizer.json"
TOKENIZER_TYPES: dict[str, tuple[str, ...] | str] = {
    "HuggingFaceTokenizer": (".json",),
    "Llama3Tokenizer": (".json",),
    "MistralTokenizer": (".model", ".json"),
    "SentencePieceTokenizer": (".model",),
    "GPTSentencePieceTokenizer": (".model",),
    "Llama2Tokenizer": (".model",),
    "GPT2BPETokenizer": BYTE_LEVEL_BPE,
    "TikTokenizer": "a tiktoken vocabulary is not read: give the model's tokenizer.json, which holds the same",
    "BertWordPieceLowerCase": "WordPiece loses case and spaces: give a tokenizer that gives the text back",
    "BertWordPieceCase": "WordPiece loses spaces: give a tokenizer that gives the text back",
    "SFTTokenizer": "conversations: --chat, with the template beside a tokenizer.json",
    "NullTokenizer": "it makes no ids of text: give a tokenizer; shards that hold ids need no preprocessing",
    "MultimodalTokenizer": "text only: give a tokenizer of text",
    "NullMultimodalTokenizer": "text only: give a tokenizer of text",
}
"""--tokenizer-type -> how its file's name may end, `BYTE_LEVEL_BPE`, or why it is not here and what to do."""
OPTIONS = [
    *_FIELDS,
    *(
        Option(name, note=why, group=group)
        for group, reasons in _NONE.items()
        for why, names in reasons.items()
        for name in names.split()
    ),
]


def find_option(name: str) -> Option | None:
    """pretrain_gpt.py's option of this name (`--seq-length`, `seq_length`); None: it has none."""
    wanted = spelled(name)
    exact = _by_name().get(wanted)
    return exact or next((one for one in OPTIONS if "*" in one.name and fnmatchcase(wanted, one.name)), None)


def spelled(name: str) -> str:
    """`seq_length` and `--seq_length` as `--seq-length`."""
    return "--" + name.lstrip("-").replace("_", "-")


@cache
def _by_name() -> dict[str, Option]:
    return {option.name: option for option in OPTIONS}
