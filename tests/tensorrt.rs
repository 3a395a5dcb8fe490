//! TensorRT against the real library where it is found (`make tensorrt` gets it), and what happens where it is not.

use std::ffi::OsStr;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use aotron::Error;
use aotron::backend::tensorrt::lower::{Attends, Constants, Lowered, Sizes, lower};
use aotron::backend::tensorrt::{BuildOptions, Kind, Layers, Library, Monitor, Plan, Severity, Version};
use aotron::checkpoint::{Checkpoint, ModelConfig};
use aotron::compile::{Precision, optimized_graph};
use aotron::tensor::DType;

const TINY_CHAT: &str = "tests/data/tiny-chat";
const SM_80: Option<u16> = Some(80);

/// TensorRT for RTX, or `None` and a line on standard error, past the capture of tests' output, that says so.
pub fn rtx(test: &str) -> Option<Library> {
    match Library::find(Kind::Rtx) {
        Ok(library) => Some(library),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {error}");
            None
        }
    }
}

/// Keeps the log, and breaks off after so many steps.
#[derive(Default)]
struct Recorder {
    lines: Mutex<Vec<(Severity, String)>>,
    steps: AtomicUsize,
    break_after: Option<usize>,
}

impl Monitor for Recorder {
    fn log(&self, severity: Severity, line: &str) {
        self.lines.lock().unwrap().push((severity, line.to_owned()));
    }

    fn step(&self, _phase: &str, _step: usize) -> ControlFlow<()> {
        let done = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        match self.break_after {
            Some(most) if done > most => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

const SIZES: Sizes = Sizes {
    max_sequence_tokens: 256,
    decode_sequences: 8,
    prefill_sequences: 2,
    prefill_tokens: 64,
    prefill_logits_rows: 8,
    top_tokens: 64,
};

fn lowered(library: &Library, monitor: Arc<dyn Monitor>, checkpoint: &str, attends: Attends) -> Lowered {
    let config = Checkpoint::open(Path::new(checkpoint)).unwrap().config().clone();
    lowered_model(library, monitor, &config, attends, &SIZES)
}

fn lowered_model(
    library: &Library,
    monitor: Arc<dyn Monitor>,
    config: &ModelConfig,
    attends: Attends,
    sizes: &Sizes,
) -> Lowered {
    let (graph, _) = optimized_graph(config, Precision::Bf16, sizes.max_sequence_tokens, None).unwrap();
    lower(&graph, library.network(monitor).unwrap(), attends, sizes, &Constants::Arbitrary).unwrap()
}

fn build(lowered: &mut Lowered, compute_capability: Option<u16>, list_kernels: bool) -> aotron::Result<Plan> {
    let profiles = lowered.profiles.clone();
    lowered.network.build(&BuildOptions { compute_capability, list_kernels, profiles, ..BuildOptions::default() })
}

/// The plan's kernels by profile, from the log of a build that lists them: name and outputs.
fn kernels(recorder: &Recorder) -> [Vec<(String, String)>; 2] {
    let mut kernels = [Vec::new(), Vec::new()];
    let lines = recorder.lines.lock().unwrap();
    for line in lines.iter().flat_map(|(_, text)| text.lines()) {
        let Some((name, rest)) = line.strip_prefix("Name: ").and_then(|line| line.split_once(", LayerType: ")) else {
            continue;
        };
        let (kind, rest) = rest.split_once(", ").unwrap();
        if ["signal", "wait", "shape_call", "copy"].contains(&kind) {
            continue;
        }
        let outputs = rest.split("Outputs:").nth(1).unwrap();
        kernels[usize::from(name.contains("_myl1_"))].push((name.to_owned(), outputs.to_owned()));
    }
    kernels
}

/// Kernels that write something as long as the cache (256 positions) which is not the cache.
fn cache_copies(kernels: &[(String, String)]) -> usize {
    let is_long = |output: &&str| output.contains(",256,") || output.contains(",256]");
    let is_cache = |output: &&str| output.contains(".attention.keys") || output.contains(".attention.values");
    let copies = |outputs: &str| outputs.split("Name: ").any(|output| is_long(&output) && !is_cache(&output));
    kernels.iter().filter(|(_, outputs)| copies(outputs)).count()
}

#[test]
fn tiny_chat_builds_and_decodes_in_eight_kernels_a_layer() {
    let Some(library) = rtx("tiny_chat_builds_and_decodes_in_eight_kernels_a_layer") else { return };
    let config = Checkpoint::open(Path::new(TINY_CHAT)).unwrap().config().clone();
    let recorder = Arc::new(Recorder::default());
    let mut lowered = lowered(&library, recorder.clone(), TINY_CHAT, Attends::Cache);
    let plan = build(&mut lowered, SM_80, true).unwrap();
    assert!(plan.bytes().len() > 100_000, "{plan:?}");
    let [prefill, decode] = kernels(&recorder);
    assert_eq!(cache_copies(&prefill), 2 * config.num_layers, "the way copies are found finds those of prefill");
    // first norm to squared ReLU and residual; the wanted rows' norm, the head, the largest logits
    assert_eq!(decode.len(), 8 * config.num_layers + 3, "{decode:#?}");
    assert_eq!(cache_copies(&decode), 0, "{decode:#?}");
    assert!(recorder.steps.load(Ordering::Relaxed) > 0, "the build reports its progress");
}

/// Nemotron-3-8B, whose weights are not needed to compile it.
#[test]
fn the_8b_model_compiles() {
    let Some(library) = rtx("the_8b_model_compiles") else { return };
    let config = ModelConfig {
        vocab_size: 256_000,
        hidden_size: 4096,
        intermediate_size: 16384,
        num_layers: 32,
        num_heads: 32,
        num_kv_heads: 32,
        head_dim: 128,
        rotary_dim: 64,
        rope_theta: 10000.0,
        max_position_embeddings: 4096,
        norm_eps: 1e-5,
        tie_word_embeddings: false,
        dtype: DType::BF16,
        bos_token_id: Some(2),
        eos_token_ids: vec![3],
    };
    let sizes = Sizes { max_sequence_tokens: 4096, prefill_sequences: 1, prefill_tokens: 512, ..SIZES };
    let recorder = Arc::new(Recorder::default());
    let mut lowered = lowered_model(&library, recorder.clone(), &config, Attends::Cache, &sizes);
    let plan = build(&mut lowered, SM_80, true).unwrap();
    assert!(plan.bytes().len() < 100 << 20, "{plan:?} holds weights");
    let [_, decode] = kernels(&recorder);
    assert_eq!(decode.len(), 8 * config.num_layers + 3, "{decode:#?}");
}

#[test]
fn a_first_chunk_copies_no_cache() {
    let Some(library) = rtx("a_first_chunk_copies_no_cache") else { return };
    let config = Checkpoint::open(Path::new(TINY_CHAT)).unwrap().config().clone();
    let recorder = Arc::new(Recorder::default());
    let mut lowered = lowered(&library, recorder.clone(), TINY_CHAT, Attends::Chunk);
    assert_eq!(lowered.profiles.len(), 1);
    build(&mut lowered, SM_80, true).unwrap();
    let [prefill, _] = kernels(&recorder);
    assert_eq!(prefill.len(), 9 * config.num_layers + 3, "{prefill:#?}");
    assert_eq!(cache_copies(&prefill), 0, "{prefill:#?}");
}

#[test]
fn grouped_queries_and_tied_embeddings_build() {
    let Some(library) = rtx("grouped_queries_and_tied_embeddings_build") else { return };
    // Not `gqa` and `odd`: TensorRT for RTX 1.7 has no attention over a cache for heads of 12 and 13.
    for shape in ["theta", "wide"] {
        for attends in [Attends::Cache, Attends::Chunk] {
            let mut lowered = lowered(&library, Arc::new(()), &format!("tests/data/shapes/{shape}"), attends);
            build(&mut lowered, SM_80, false).unwrap_or_else(|error| panic!("{shape}, {attends:?}: {error}"));
        }
    }
}

#[test]
fn the_network_is_what_the_graph_says() {
    let Some(library) = rtx("the_network_is_what_the_graph_says") else { return };
    let config = Checkpoint::open(Path::new(TINY_CHAT)).unwrap().config().clone();
    let lowered = lowered(&library, Arc::new(()), TINY_CHAT, Attends::Cache);
    let layers = lowered.network.layers().unwrap();
    let count = |kind: &str| layers.iter().filter(|layer| layer.kind == kind).count();
    assert_eq!(count("matrix_multiply"), 4 * config.num_layers + 1);
    assert_eq!(count("kv_cache_update"), 2 * config.num_layers);
    assert_eq!(count("attention_input"), config.num_layers);
    assert_eq!(count("rotary_embedding"), 2 * config.num_layers);
    assert_eq!(count("normalization"), 2 * config.num_layers + 1);
    assert_eq!(count("other"), 0);
    let update = layers.iter().find(|layer| layer.name.starts_with("layers.0.attention.keys/")).unwrap();
    let cache = format!("layers.0.attention.keys: bf16[-1, {}, 256, {}]", config.num_kv_heads, config.head_dim);
    assert_eq!(update.outputs, [cache]);
    let top = layers.last().unwrap();
    assert_eq!(top.inputs, [format!("logits: f32[-1, {}]", config.vocab_size)]);
    assert_eq!(top.outputs, ["top_logits: f32[-1, 64]", "top_ids: i32[-1, 64]"]);
    // Every weight once, and nothing else: the embedding, the head, the last norm, two tables; by layer, four matrices
    // and two norms.
    assert_eq!(lowered.weights.len(), 6 + 8 * config.num_layers);
}

#[test]
fn errors_carry_the_words_of_tensorrt() {
    let Some(library) = rtx("errors_carry_the_words_of_tensorrt") else { return };
    let mut lowered = lowered(&library, Arc::new(()), TINY_CHAT, Attends::Cache);
    let error = build(&mut lowered, Some(90), false).unwrap_err().to_string();
    assert!(error.starts_with("TensorRT: cannot build for compute capability 90: "), "{error}");
    assert!(error.contains("ompute capability is invalid or not supported"), "{error}");
    assert!(!error.contains("cudaError 35"), "that there is no driver is beside the point: {error}");

    let mut network = library.network(Arc::new(())).unwrap();
    network.scope("layers.0.mlp.up");
    let x = network.input("x", DType::BF16, &[2, 3]).unwrap();
    let weight = network.input("weight", DType::BF16, &[4, 5]).unwrap();
    let error = network.linear(x, weight).unwrap_err().to_string();
    assert!(error.contains("cannot add linear at layers.0.mlp.up: "), "{error}");
    assert!(error.contains("input0 = 3") && error.contains("input1 = 5"), "{error}");
    // The network is as it was, and a tensor that another network has is refused.
    let wide = network.input("wide", DType::BF16, &[4, 3]).unwrap();
    let y = network.linear(x, wide).unwrap();
    let mut other = library.network(Arc::new(())).unwrap();
    let error = other.relu(y).unwrap_err().to_string();
    assert!(error.contains("the network has no tensor"), "{error}");
    let error = network.input("deep", DType::F32, &[1; 12]).unwrap_err().to_string();
    assert!(error.contains("12 dimensions"), "{error}");
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let Some(library) = rtx("sizes_that_do_not_fit_are_refused") else { return };
    let config = Checkpoint::open(Path::new(TINY_CHAT)).unwrap().config().clone();
    let (graph, _) = optimized_graph(&config, Precision::Bf16, SIZES.max_sequence_tokens, None).unwrap();
    for top_tokens in [0, 3841] {
        let sizes = Sizes { top_tokens, ..SIZES };
        let network = library.network(Arc::new(())).unwrap();
        let error = lower(&graph, network, Attends::Cache, &sizes, &Constants::Arbitrary).unwrap_err().to_string();
        assert!(error.contains(&format!("top_tokens is {top_tokens}, accepted are 1 to 3840")), "{error}");
    }
    let sizes = Sizes { prefill_tokens: 0, ..SIZES };
    let mut lowered = lowered_model(&library, Arc::new(()), &config, Attends::Cache, &sizes);
    let error = build(&mut lowered, SM_80, false).unwrap_err().to_string();
    assert!(error.starts_with("TensorRT: cannot "), "{error}");
}

#[test]
fn a_build_can_be_cancelled_and_repeated() {
    let Some(library) = rtx("a_build_can_be_cancelled_and_repeated") else { return };
    let recorder = Arc::new(Recorder { break_after: Some(2), ..Recorder::default() });
    let mut cancelled = lowered(&library, recorder.clone(), TINY_CHAT, Attends::Cache);
    let error = build(&mut cancelled, SM_80, false).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let mut whole = lowered(&library, Arc::new(()), TINY_CHAT, Attends::Cache);
    build(&mut whole, SM_80, false).unwrap();
}

/// A library of this code, in C, in a fresh folder.
fn stub(folder: &Path, kind: Kind, code: &str) -> PathBuf {
    let source = folder.join("stub.c");
    std::fs::write(&source, code).unwrap();
    let library = folder.join(kind.file_name());
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let arguments = ["-shared", "-fPIC", "-x", "c"].map(OsStr::new);
    let done = Command::new(compiler).args(arguments).arg(&source).arg("-o").arg(&library).status().unwrap();
    assert!(done.success());
    library
}

#[test]
fn what_is_not_the_library_is_refused() {
    for kind in Kind::ALL {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path| Library::open(kind, path).unwrap_err().to_string();

        let text = folder.path().join("text.so");
        std::fs::write(&text, "not a library").unwrap();
        assert!(refused(&text).contains("text.so"), "{}", refused(&text));
        assert!(refused(&folder.path().join("absent.so")).contains("absent.so"));

        let foreign = stub(folder.path(), kind, "int other(void) { return 1; }");
        let error = refused(&foreign);
        assert!(error.contains("no function getInferLibVersion, so it is another library"), "{error}");

        let headers = kind.header_version();
        for (version, serves) in [
            (Version { major: headers.major - 1, ..headers }, false),
            (Version { major: headers.major + 1, ..headers }, false),
            (Version { minor: headers.minor - 1, ..headers }, false),
            (Version { minor: headers.minor + 1, patch: 0, ..headers }, true),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let number = version.major * 10000 + version.minor * 100 + version.patch;
            let code = format!(
                "int getInferLibVersion(void) {{ return {number}; }}\n\
                 void* createInferBuilder_INTERNAL(void* logger, int version) {{ return 0; }}\n"
            );
            let path = stub(folder.path(), kind, &code);
            if serves {
                let library = Library::open(kind, &path).unwrap();
                assert_eq!((library.version(), library.path()), (version, path));
                let error = library.network(Arc::new(())).unwrap_err().to_string();
                assert_eq!(error, "TensorRT: cannot create a builder: TensorRT gives no reason");
            } else {
                let error = refused(&path);
                assert!(error.contains(&format!("it is version {version}, and this aotron needs")), "{error}");
            }
        }
    }
}
