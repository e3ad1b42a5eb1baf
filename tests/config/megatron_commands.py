"""Command lines of pretrain_gpt.py as users type them, and what they are here.

Paths and sizes are ours; which options stand together is as in Megatron-LM's README, examples and training recipes of
2024 and 2026.
"""

from typing import Any

_GPT_345M = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 "
    "--micro-batch-size 4 --global-batch-size 8 --lr 0.00015 --train-iters 500000 --lr-decay-iters 320000 "
    "--lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --fp16"
)
_LLAMA = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope "
    "--rotary-base 500000 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0 --micro-batch-size 1 "
    "--global-batch-size 128 --train-iters 1000 --lr 3e-4 --bf16"
)
_TINY = (
    "--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512 "
    "--micro-batch-size 2 --global-batch-size 16 --lr 1e-3 --train-iters 1000"
)

# name -> (command line, fields that it sets, words of what is said beside them)
TRANSLATED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "345M of the README": (
        f"torchrun pretrain_gpt.py {_GPT_345M} --data-path my-gpt2_text_document --vocab-file gpt2-vocab.json "
        "--merge-file gpt2-merges.txt --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 "
        "--eval-iters 10 --save ckpt/345m --load ckpt/345m",
        {
            "model.num_layers": 24,
            "model.num_query_groups": 16,
            "model.rotary_base": 10000.0,
            "model.vocab_size": 50258,
            "model.mask_token_id": 50257,
            "data.train_paths": ["my-gpt2_text_document"],
            "data.holdout_tokens": 10 * 8 * 1024,
            "schedule.warmup_steps": 3200,
            "schedule.decay_start": 3200,
            "schedule.decay_steps": 316800,
            "validation.num_samples": 80,
            "checkpoint.save_dir": "ckpt/345m",
            "optimizer.adam_beta2": 0.999,
        },
        [
            "data.tokenizer_path: the PREFIX.tokenizer.json",
            "--fp16: bf16 here",
            "--attention-dropout 0.1 (the default)",
        ],
    ),
    "175B with a ramp-up": (
        "torchrun --nproc_per_node 8 --nnodes 128 --master_addr node0 --master_port 6000 pretrain_gpt.py "
        "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 1536 "
        "--rampup-batch-size 16 16 5859375 --train-samples 146484375 --lr 6.0e-5 --min-lr 6.0e-6 "
        "--lr-decay-style cosine --lr-decay-samples 126953125 --lr-warmup-samples 183105 --weight-decay 0.1 "
        "--adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --tensor-model-parallel-size 8 "
        "--pipeline-model-parallel-size 16 --bf16 --data-path c4_text_document",
        {
            "training.rampup_batch_size": (16, 16, 5859375),
            "training.train_steps": 111354,
            "schedule.warmup_steps": 7028,
            "model.init_method_std": 0.006,
            "model.embedding_init_std": 0.006,
            "parallel.pipeline_model_parallel_size": 16,
            "parallel.use_distributed_optimizer": False,
        },
        ["while the batch grows to 1536", "set validation.* and data.holdout_tokens"],
    ),
    "batch in steps": (
        f"{_TINY} --step-batch-size-schedule '0:4 1M:8 2M:12 3M:16' --mock-data",
        {"training.rampup_batch_size": (4, 4, 5859)},
        ["--mock-data: make a corpus", "data.train_paths or data.blend: the command line names no --data-path"],
    ),
    "batch in uneven steps": (
        f"{_TINY} --step-batch-size-schedule '0:4 250M:8 300M:16'",
        {"training.rampup_batch_size": None, "training.global_batch_size": 16},
        ["--step-batch-size-schedule: rampup_batch_size has steps of one length"],
    ),
    "Llama 3 8B": (
        f"pretrain_gpt.py {_LLAMA} --kv-channels 128 --init-method-std 0.0134 --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model llama3/tokenizer.json --vocab-size 128256 --data-path slim_text_document --split 99,1,0 "
        "--no-create-attention-mask-in-dataloader --no-mmap-bin-files --eval-iters 32 --eval-interval 100",
        {
            "model.ffn_hidden_size": 14336,
            "model.num_query_groups": 8,
            "model.kv_channels": 128,
            "model.tie_word_embeddings": False,
            "model.vocab_size": 128257,
            "data.tokenizer_path": "llama3/tokenizer.json",
            "training.precision": "bf16",
            "validation.num_samples": 4096,
        },
        ["there is no causal mask to make", "a vocabulary of 128256 has no mask"],
    ),
    "Llama 3.1's frequencies": (
        f"{_LLAMA} --use-rope-scaling --rope-scaling-factor 8.0 --qk-layernorm",
        {"model.max_sequence_length": 8192},
        [],
    ),
    "FP8": (
        f"{_LLAMA} --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather "
        "--use-distributed-optimizer --no-fp8-wgrad",
        {
            "training.precision": "fp8",
            "fp8.recipe": "delayed",
            "fp8.amax_history_len": 1024,
            "fp8.param_gather": True,
            "fp8.num_layers_at_start_in_bf16": 0,
        },
        ["--no-fp8-wgrad: of FP8 the linear layers' products, all three of them"],
    ),
    "FP8 of this machine's own": (
        f"{_LLAMA} --fp8-format hybrid --fp8-recipe blockwise --first-last-layers-bf16 --num-layers-at-end-in-bf16 2",
        {
            "fp8.recipe": "blockwise",
            "fp8.num_layers_at_start_in_bf16": 1,
            "fp8.num_layers_at_end_in_bf16": 2,
        },
        ["--fp8-format hybrid: blockwise is e4m3 here"],
    ),
    "decoupled rates": (
        f"{_LLAMA} --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr 1.5e-4",
        {"training.lr": 1.5e-4},
        ["--decoupled-lr 5.0e-4: all parameters have one rate"],
    ),
    "gradients on their way": (
        f"{_LLAMA} --use-distributed-optimizer --grad-reduce-in-bf16 --ddp-average-in-collective --deterministic-mode "
        "--ddp-pad-buckets-for-high-nccl-busbw",
        {
            "parallel.grad_reduce_in_bf16": True,
            "parallel.ddp_average_in_collective": False,
            "parallel.ddp_pad_buckets_for_high_nccl_busbw": True,
            "training.deterministic": True,
        },
        [],
    ),
    "gradients of the plain optimizer": (
        f"{_LLAMA} --grad-reduce-in-bf16 --ddp-average-in-collective",
        {"parallel.grad_reduce_in_bf16": False, "parallel.ddp_average_in_collective": True},
        [],
    ),
    "Mixtral": (
        f"{_LLAMA} --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --expert-model-parallel-size 8 "
        "--pipeline-model-parallel-size 4 --use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce",
        {"parallel.overlap_param_gather": True, "parallel.use_distributed_optimizer": True},
        ["--num-experts 8: no experts", "--moe-router-topk 2: no experts", "--expert-model-parallel-size 8"],
    ),
    "one expert-parallel rank": (
        f"{_LLAMA} --expert-model-parallel-size 1 --context-parallel-size 1 --optimizer adam",
        {"model.num_layers": 32},
        [],
    ),
    "context parallel": (
        f"{_LLAMA} --context-parallel-size 2 --cp-comm-type p2p",
        {"data.sequence_length": 8192, "parallel.context_parallel_size": 2},
        ["--cp-comm-type p2p: keys and values go round a ring"],
    ),
    "interleaved pipeline by layers": (
        f"{_LLAMA} --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 "
        "--num-layers-per-virtual-pipeline-stage 2 --sequence-parallel",
        {"parallel.virtual_pipeline_model_parallel_size": 4, "parallel.sequence_parallel": True},
        [],
    ),
    "interleaved pipeline by stages": (
        f"{_LLAMA} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        {"parallel.virtual_pipeline_model_parallel_size": 2},
        [],
    ),
    "sequence parallel without tensor parallel": (
        f"{_LLAMA} --sequence-parallel --ddp-bucket-size 40000000",
        {"parallel.sequence_parallel": False, "parallel.ddp_bucket_size": None},
        [],
    ),
    "uneven pipeline": (
        f"{_LLAMA} --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 15",
        {"parallel.pipeline_model_parallel_size": 2, "parallel.pipeline_layout": f"E{'t' * 15}|{'t' * 17}L"},
        [],
    ),
    "uneven pipeline as Megatron writes it": (
        f"{_LLAMA} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'E(t*7|)*3,t*11L'",
        {"parallel.virtual_pipeline_model_parallel_size": 2, "parallel.pipeline_layout": "E(t*7|)*3,t*11L"},
        [],
    ),
    "embedding and loss as layers": (
        f"{_LLAMA} --num-layers 30 --pipeline-model-parallel-size 4 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
        {"parallel.pipeline_layout": f"E{'t' * 7}|{'t' * 8}|{'t' * 8}|{'t' * 7}L"},
        [],
    ),
    "blend": (
        f"{_TINY} --data-path 0.3 /data/web_text_document 0.7 /data/code_text_document --split 98,2,0 --eval-iters 4",
        {
            "data.blend": [("web_text_document", 0.3), ("code_text_document", 0.7)],
            "data.train_paths": [],
            "data.holdout_tokens": 32 * 512,
        },
        ["--split would hold out 0.02 of the documents"],
    ),
    "blend in one string": (
        f'{_TINY} --data-path "50 a 50 sub/a"',
        {"data.blend": [("a", 50.0), ("a_again1", 50.0)]},
        [],
    ),
    "corpora without weights": (f"{_TINY} --data-path a b c", {"data.train_paths": ["a", "b", "c"]}, []),
    "validation paths": (
        f"{_TINY} --train-data-path 1 a --valid-data-path 0.5 held 0.5 out --test-data-path t --eval-iters 8",
        {"data.validation_paths": ["held", "out"], "data.holdout_tokens": 0, "validation.interval_steps": 1000},
        ["--test-data-path t: there is no test set"],
    ),
    "no validation": (
        f"{_TINY} --data-path a --split 100,0,0 --eval-interval 100",
        {"validation.interval_steps": None, "data.holdout_tokens": 0},
        [],
    ),
    "documents apart": (
        f"{_TINY} --data-path a --reset-position-ids --reset-attention-mask --eod-mask-loss",
        {"diffusion.attention_boundary": "document"},
        ["--eod-mask-loss: each token that is masked is predicted", "--reset-position-ids: rotary positions"],
    ),
    "WSD": (
        f"{_TINY} --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 200 --lr-warmup-iters 50",
        {"schedule.decay_style": "linear", "schedule.decay_start": 800, "schedule.warmup_steps": 50},
        [],
    ),
    "WSD, exponential": (
        f"{_TINY} --lr-decay-style WSD --lr-wsd-decay-iters 200",
        {"schedule.decay_style": "linear", "schedule.decay_start": 800},
        ["a decay of style exponential: linear is written"],
    ),
    "constant rate": (f"{_TINY} --lr-decay-style constant", {"schedule.decay_start": "never"}, []),
    "inverse square root": (
        f"{_TINY} --lr-decay-style inverse-square-root --lr-warmup-iters 10",
        {"schedule.decay_start": "never", "schedule.warmup_steps": 10},
        ["a decay of style inverse-square-root: constant is written"],
    ),
    "by samples": (
        f"{_TINY} --train-samples 32000 --lr-decay-samples 16000 --lr-warmup-samples 1600 --min-lr 1e-4",
        {"training.train_steps": 2000, "schedule.decay_steps": 900, "schedule.warmup_steps": 100},
        [],
    ),
    "recompute fully": (
        f"{_TINY} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        {"training.recompute": "full"},
        ["--recompute-method uniform: full makes each layer again"],
    ),
    "recompute activations": (f"{_TINY} --recompute-activations", {"training.recompute": "selective"}, []),
    "checkpoints": (
        f"{_TINY} --save out --load in --save-interval 500 --save-retain-interval 5000 --async-save "
        "--ckpt-format torch_dist --no-load-optim --no-load-rng --exit-interval 700 --exit-duration-in-mins 230 "
        "--exit-signal-handler",
        {
            "checkpoint.save_dir": "out",
            "checkpoint.load_dir": "in",
            "checkpoint.keep_every": 5000,
            "checkpoint.keep_last": 1,
            "training.exit_steps": 700,
        },
        ["is read by `illada checkpoint reshard", "--no-load-optim: begin from weights", "saves and ends on SIGTERM"],
    ),
    "logs": (
        f"{_TINY} --log-interval 5 --tensorboard-dir tb --wandb-project llm --wandb-exp-name one --log-throughput "
        "--log-params-norm --timing-log-level 2 --distributed-timeout-minutes 60 --seed 42 --profile",
        {
            "logging.interval_steps": 5,
            "logging.tensorboard_dir": "tb",
            "logging.wandb_project": "llm",
            "run_dir": "runs/translated",
            "runtime.distributed_timeout_minutes": 60.0,
            "training.seed": 42,
        },
        [
            "--log-throughput: what is logged is fixed",
            "--wandb-exp-name one: Weights & Biases reads its own",
            "--profile: there is no profiler",
        ],
    ),
    "batch from torchrun": (
        "torchrun --nproc_per_node=8 --nnodes=4 pretrain_gpt.py "
        + _TINY.replace("--global-batch-size 16", "--tensor-model-parallel-size 4 --bf16"),
        {"training.global_batch_size": 16},
        [],
    ),
    "equals signs and underscores": (
        f"{_TINY} --adam_beta2=0.95 --weight-decay=0.1",
        {"optimizer.adam_beta2": 0.95, "optimizer.weight_decay": 0.1, "optimizer.adam_beta1": 0.9},
        [],
    ),
    "of a fork": (
        f"{_TINY} --our-own-flag 3 --num-layer 4",
        {"model.num_layers": 8},
        ["--our-own-flag", "--num-layer (did you mean --num-layers?)"],
    ),
    "of BERT and vision": (
        f"{_TINY} --mask-prob 0.15 --bert-no-binary-head --fim-data --mtp-num-layers 1 --img-h 224",
        {},
        [
            "--mask-prob 0.15: the masked share is drawn",
            "--fim-data: any gap is filled",
            "--mtp-num-layers 1: there is no",
        ],
    ),
}

# name -> (command line, words of the error)
REFUSED: dict[str, tuple[str, list[str]]] = {
    "too little": (
        "--num-layers 2 --hidden-size 64",
        ["lacks --num-attention-heads, --seq-length, --micro-batch-size, --lr", "--global-batch-size"],
    ),
    "no number": (f"{_TINY} --lr fast", ["--lr is fast, expected a number"]),
    "value of a flag": (f"{_TINY} --bf16 true", ["--bf16 takes no value, found true"]),
    "another program": (f"torchrun pretrain_t5.py {_TINY}", ["pretrain_t5.py trains another model"]),
    "heads that do not divide": (f"{_TINY} --num-attention-heads 7", ["hidden_size 256 is not a multiple of"]),
    "WSD without a length": (f"{_TINY} --lr-decay-style WSD", ["lacks --lr-wsd-decay-iters"]),
    "weights and paths mixed up": (f"{_TINY} --data-path 0.3 a b", ["train_paths has numbers among its paths"]),
    "virtual stages that do not fit": (
        f"{_TINY} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        ["--num-layers 8 is not a multiple of"],
    ),
    "an unset variable": (f"{_TINY} --save $CHECKPOINTS", ["--save $CHECKPOINTS", "NAME=VALUE"]),
}
