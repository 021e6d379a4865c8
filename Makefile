# make demo [RECIPE=sft_llava] [SEED=0]    from a bare clone to a fine-tuned tiny model and what it has learned;
#                                          RECIPE: sft_llava, idefics2_docvqa, dpo_idefics2, finetune_minicpm_lora, llava_two_stage;
#                                          of sft_llava also [MODEL=llava]: qwen3_vl, smolvlm
# make test                                ruff, the copies of the workbench, and every test
# make test-newest                         every test, with the newest releases of what the recipes build on
# make sync                                copy workbench/workbench.py into the recipes
RECIPE ?= sft_llava
MODEL ?= llava
SEED ?= 0
PYTHON ?= python3
PY := .venv/bin/python
NEW := .venv/newest/bin/python
TINY := build/tiny-$(SEED)
FORMS := build/forms-$(SEED)
PAIRS := build/pairs-$(SEED)
TALKS := build/minicpm-$(SEED)
PARTS := build/parts-$(SEED)
RUN := build/$(RECIPE)-$(SEED)

# The models here are tiny: more threads would only wait for each other.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export HF_DATASETS_CACHE := $(CURDIR)/build/datasets
export TOKENIZERS_PARALLELISM := false

TWO_STAGE := --seed $(SEED) --max_steps 300 --per_device_train_batch_size 32 --gradient_accumulation_steps 1 \
  --per_device_eval_batch_size 50 --eval_steps 100 --save_steps 100 --activation_checkpointing false --sample_tokens 16 \
  --dataloader_num_workers 1

.PHONY: demo demo-sft_llava demo-idefics2_docvqa demo-dpo_idefics2 demo-finetune_minicpm_lora demo-llava_two_stage test test-newest sync clean

demo: demo-$(RECIPE)

.venv/done: requirements.txt requirements-dev.txt requirements-compare.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements-dev.txt
	$(PY) -m pip install -q --no-deps -r requirements-compare.txt
	touch $@

# One test asks an older Transformers, too, which cannot be installed beside today's.
.venv/older/done: requirements-older.txt
	$(PYTHON) -m venv .venv/older
	.venv/older/bin/python -m pip install -q -r requirements-older.txt
	touch $@

# Some processors want torchvision. It stands in a folder of its own: everything else is tested without it.
.venv/vision/done: .venv/done requirements-vision.txt tiny/torchvision_on_cpu.py
	$(PY) tiny/torchvision_on_cpu.py .venv/vision
	touch $@

# The processors of other models than LLaVA want torchvision.
ifneq ($(MODEL),llava)
TINY := build/$(MODEL)-$(SEED)
RUN := build/$(RECIPE)-$(MODEL)-$(SEED)
demo-sft_llava: .venv/vision/done
demo-sft_llava: private PY := PYTHONPATH=.venv/vision $(PY)
endif

# The newest releases are tried in an environment of their own. What is pinned comes first, so that nothing else differs.
.venv/newest/done: requirements.txt requirements-dev.txt requirements-compare.txt
	$(PYTHON) -m venv .venv/newest
	$(NEW) -m pip install -q -r requirements-dev.txt
	$(NEW) -m pip install -q --no-deps -r requirements-compare.txt
	touch $@

# The best checkpoint is not looked for: it would be chosen by the very pictures that the table is about.
demo-sft_llava: .venv/done
	$(PY) -m tiny $(MODEL) --out $(TINY) --seed $(SEED)
	$(PY) sft_llava.py --use_cpu --model_name_or_path $(TINY)/model --dataset_name $(TINY)/data --output_dir $(RUN) \
	  --seed $(SEED) --max_steps 400 --learning_rate 1e-3 --per_device_train_batch_size 32 --gradient_accumulation_steps 1 \
	  --activation_checkpointing false --load_best_model_at_end false --sample_tokens 8 --dataloader_num_workers 1
	$(PY) tools/generate.py $(RUN) --dataset_name $(TINY)/data --dataset_train_split test --batch_size 64 \
	  --max_new_tokens 16 --base_only --output $(RUN)/before.jsonl --overwrite
	$(PY) tools/generate.py $(RUN) --dataset_name $(TINY)/data --dataset_train_split test --batch_size 64 \
	  --max_new_tokens 16 --output $(RUN)/after.jsonl --overwrite
	$(PY) -m tiny report $(RUN)
	$(PY) tools/plot_run.py $(RUN) --metrics loss mean_token_accuracy
	@echo "base and fine-tuned side by side, in a browser: $(PY) tools/compare.py $(RUN)"

demo-idefics2_docvqa: .venv/done
	$(PY) -m tiny idefics2 --out $(FORMS) --seed $(SEED)
	$(PY) idefics2_docvqa.py --use_cpu --model_name_or_path $(FORMS)/model --dataset_name $(FORMS)/data --output_dir $(RUN) \
	  --seed $(SEED) --max_steps 300 --learning_rate 2e-3 --per_device_train_batch_size 32 --gradient_accumulation_steps 1 \
	  --activation_checkpointing false --load_best_model_at_end false --max_new_tokens 16 --dataloader_num_workers 1 \
	  --eval_steps 50 --save_steps 100 --eval_on_start true --per_device_eval_batch_size 50
	$(PY) tools/generate.py $(RUN) --dataset_name $(FORMS)/data --dataset_train_split test --batch_size 64 \
	  --max_new_tokens 16 --base_only --output $(RUN)/before.jsonl --overwrite
	$(PY) tools/generate.py $(RUN) --dataset_name $(FORMS)/data --dataset_train_split test --batch_size 64 \
	  --max_new_tokens 16 --output $(RUN)/after.jsonl --overwrite
	$(PY) evals/docvqa.py $(RUN)/after.jsonl --worst 10
	$(PY) -m tiny report $(RUN)
	$(PY) tools/plot_run.py $(RUN) --metrics loss anls exact_match
	@echo "base and fine-tuned side by side, in a browser: $(PY) tools/compare.py $(RUN)"

demo-dpo_idefics2: .venv/done
	$(PY) -m tiny idefics2_dpo --out $(PAIRS) --seed $(SEED)
	$(PY) dpo_idefics2.py --use_cpu --model_name_or_path $(PAIRS)/model --dataset_name $(PAIRS)/data --output_dir $(RUN) \
	  --seed $(SEED) --max_steps 200 --learning_rate 1e-3 --loss_type sigmoid sft --per_device_train_batch_size 16 \
	  --gradient_accumulation_steps 1 --per_device_eval_batch_size 50 --activation_checkpointing false --max_new_tokens 32 \
	  --dataloader_num_workers 1
	for when in before after; do \
	  $(PY) tools/generate.py $(RUN) --dataset_name $(PAIRS)/data --dataset_train_split test --batch_size 64 --max_new_tokens 32 \
	    $$(test $$when = after || echo --base_only) --output $(RUN)/$$when.jsonl --overwrite && \
	  $(PY) tools/generate.py $(RUN) --dataset_name $(PAIRS)/amber/query_discriminative.json --image_folder $(PAIRS)/amber/image \
	    --question_column query --append "Please answer yes or no." --batch_size 64 --max_new_tokens 8 \
	    $$(test $$when = after || echo --base_only) --output $(RUN)/amber-$$when.jsonl --overwrite || exit 1; done
	$(PY) evals/amber.py $(RUN)/amber-after.jsonl --annotations $(PAIRS)/amber/annotations.json --compare $(RUN)/amber-before.jsonl
	$(PY) -m tiny report $(RUN)
	$(PY) tools/plot_run.py $(RUN) --metrics loss rewards/accuracies rewards/margins
	@echo "base and fine-tuned side by side, in a browser: $(PY) tools/compare.py $(RUN)"

demo-finetune_minicpm_lora: .venv/done
	$(PY) -m tiny minicpmv4_6 --out $(TALKS) --seed $(SEED)
	$(PY) finetune_minicpm_lora.py --use_cpu --model_name_or_path $(TALKS)/model --dataset_name $(TALKS)/json/train.json \
	  --image_folder $(TALKS)/json/images --eval_dataset_name $(TALKS)/json/test.json --output_dir $(RUN) --seed $(SEED) --max_steps 300 \
	  --learning_rate 2e-3 --lora_r 16 --lora_alpha 32 --lora_dropout 0 --per_device_train_batch_size 32 --per_device_eval_batch_size 50 \
	  --gradient_accumulation_steps 1 --activation_checkpointing false --load_best_model_at_end false --sample_tokens 16 \
	  --dataloader_num_workers 1
	for what in before after shuffled; do \
	  $(PY) tools/generate.py $(RUN) --dataset_name $(TALKS)/json/$$(test $$what = shuffled && echo shuffled || echo test).json \
	    --image_folder $(TALKS)/json/images --batch_size 64 --max_new_tokens 16 $$(test $$what != before || echo --base_only) \
	    --output $(RUN)/$$what.jsonl --overwrite || exit 1; done
	$(PY) -m tiny report $(RUN)
	$(PY) tools/plot_run.py $(RUN) --metrics loss
	@echo "base and fine-tuned side by side, in a browser: $(PY) tools/compare.py $(RUN)"

demo-llava_two_stage: .venv/done
	$(PY) -m tiny llava_two_stage --out $(PARTS) --seed $(SEED)
	$(PY) llava_two_stage.py --use_cpu --stage align --vision_tower $(PARTS)/vision --language_model $(PARTS)/language \
	  --dataset_name $(PARTS)/json/captions.json --image_folder $(PARTS)/json/images --eval_dataset_name $(PARTS)/json/captions-test.json \
	  --output_dir $(RUN)-align $(TWO_STAGE) --projector_learning_rate 2e-3
	$(PY) llava_two_stage.py --use_cpu --stage instruct --model_name_or_path $(RUN)-align --dataset_name $(PARTS)/json/train.json \
	  --image_folder $(PARTS)/json/images --eval_dataset_name $(PARTS)/json/test.json --output_dir $(RUN) $(TWO_STAGE) \
	  --learning_rate 5e-4 --projector_learning_rate 5e-4
	for when in before after; do base=$$(test $$when = after || echo --base_only) && \
	  $(PY) tools/generate.py $(RUN)-align --dataset_name $(PARTS)/json/captions-test.json --image_folder $(PARTS)/json/images \
	    --batch_size 64 --max_new_tokens 16 $$base --output $(RUN)/captions-$$when.jsonl --overwrite && \
	  $(PY) tools/generate.py $(RUN) --dataset_name $(PARTS)/json/test.json --image_folder $(PARTS)/json/images \
	    --batch_size 64 --max_new_tokens 16 $$base --output $(RUN)/$$when.jsonl --overwrite || exit 1; done
	$(PY) -m tiny report $(RUN)
	$(PY) tools/plot_run.py $(RUN)-align $(RUN) --output $(RUN)/curves.png --overwrite --metrics loss
	@echo "base and fine-tuned side by side, in a browser: $(PY) tools/compare.py $(RUN)    (stage 1: $(RUN)-align)"

test: .venv/done .venv/older/done .venv/vision/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) workbench/sync.py --check
	$(PY) -m pytest -n 2 --dist loadfile  # two processes, a file stays in one
	PYTHONPATH=$(CURDIR)/.venv/vision $(PY) -m pytest -n 2 --dist loadfile tests/test_families*.py
	PYTHONPATH=$(CURDIR)/.venv/vision $(PY) -m pytest -n 2 -m torchvision tests/test_dpo_*.py

# torch and bitsandbytes stay as they are: torchvision in .venv/vision goes with this torch, and 4-bit with both.
test-newest: export HF_DATASETS_CACHE := $(CURDIR)/build/datasets-newest
test-newest: .venv/newest/done .venv/older/done .venv/vision/done
	$(NEW) -m pip install -q -U transformers trl peft datasets accelerate $$(grep -E '^(torch|bitsandbytes)==' requirements.txt)
	$(NEW) -m pip freeze | grep -E '^(transformers|trl|peft|datasets|accelerate|torch|bitsandbytes)=='
	$(NEW) -m pytest -n 2 --dist loadfile
	PYTHONPATH=$(CURDIR)/.venv/vision $(NEW) -m pytest -n 2 --dist loadfile tests/test_families*.py
	PYTHONPATH=$(CURDIR)/.venv/vision $(NEW) -m pytest -n 2 -m torchvision tests/test_dpo_*.py

# After a change to workbench/workbench.py: copy what each recipe uses of it under the line in that recipe.
sync: .venv/done
	$(PY) workbench/sync.py

clean:
	rm -rf build
