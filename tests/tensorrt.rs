//! Tests of the TensorRT backend against the real library (`make tensorrt` downloads it), and of the errors without it.

use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aotron::Error;
use aotron::backend::tensorrt::analysis::{StepKernels, Traffic};
use aotron::backend::tensorrt::kernels::{GpuKernel, KernelKind, KernelLog, KernelTensor, Kernels};
use aotron::backend::tensorrt::lower::{
    Attends, AttentionInput, Constants, Fp8Weights, LoweredNetwork, LoweringOptions, Sizes, lower, lower_with,
};
use aotron::backend::tensorrt::{
    BuildOptions, ConstantBytes, Layers, LibraryKind, Monitor, SerializedPlan, ShapeRange, TensorRtLibrary, Version,
};
use aotron::checkpoint::{Checkpoint, ModelConfig};
use aotron::compile::{Calibration, Precision, optimized_graph};
use aotron::engine::tensorrt::{Binding, BindingRole, Extent};
use aotron::tensor::DType;

use crate::skips::skip;

const TINY_CHAT: &str = "tests/data/tiny-chat";
const CACHE: Attends = Attends::Cache(AttentionInput::Mask);
const SM_80: Option<u16> = Some(80);

/// TensorRT for RTX; `None`, with `test` reported as skipped, if it is not installed.
pub fn rtx(test: &str) -> Option<TensorRtLibrary> {
    TensorRtLibrary::find(LibraryKind::Rtx).map_err(|error| skip("tensorrt", test, error)).ok()
}

/// Counts build steps, and cancels after a given number.
#[derive(Default)]
struct Recorder {
    steps: AtomicUsize,
    break_after: Option<usize>,
}

impl Monitor for Recorder {
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
    position_tokens: 256,
    decode_sequences: 8,
    prefill_sequences: 2,
    prefill_tokens: 64,
    prefill_logits_rows: 8,
    top_tokens: 64,
};

fn lowered(library: &TensorRtLibrary, monitor: Arc<dyn Monitor>, checkpoint: &str, attends: Attends) -> LoweredNetwork {
    let config = Checkpoint::open(Path::new(checkpoint)).unwrap().config().clone();
    lowered_model(library, monitor, &config, attends, &SIZES)
}

fn lowered_model(
    library: &TensorRtLibrary,
    monitor: Arc<dyn Monitor>,
    config: &ModelConfig,
    attends: Attends,
    sizes: &Sizes,
) -> LoweredNetwork {
    let (graph, _) = optimized_graph(config, Precision::Bf16, sizes.max_sequence_tokens, None).unwrap();
    lower(&graph, library.network(monitor).unwrap(), attends, sizes, &Constants::Arbitrary).unwrap()
}

fn build(
    lowered: &mut LoweredNetwork,
    compute_capability: Option<u16>,
    list_kernels: bool,
) -> aotron::Result<SerializedPlan> {
    let profiles = lowered.profiles.clone();
    lowered.network.build(&BuildOptions { compute_capability, list_kernels, profiles, ..BuildOptions::default() })
}

/// Two layers of the 8B's widths.
fn two_wide_layers() -> ModelConfig {
    ModelConfig {
        hidden_size: 4096,
        intermediate_size: 16384,
        num_layers: 2,
        num_heads: 32,
        num_kv_heads: 32,
        head_dim: 128,
        rotary_dim: 64,
        ..tiny_chat()
    }
}

/// For each quantized precision, on tiny-chat and on two layers of the 8B's widths: a maximum number of kernels per
/// layer, only GEMMs read weights, and neither decoding nor context prefill copies a cache.
#[test]
fn quantized_linear_layers_read_their_codes_in_place() {
    let Some(library) = rtx("quantized_linear_layers_read_their_codes_in_place") else { return };
    let wide = two_wide_layers();
    let (inputs, constants) = (Fp8Weights::Inputs, Fp8Weights::Constants);
    let mut decoded = Vec::new();
    for (precision, fp8_weights, capability, most) in [
        (Precision::Int8, inputs, 80, 9),
        (Precision::Int4, inputs, 80, 10),
        (Precision::Fp8, inputs, 89, 10),
        (Precision::Fp8, constants, 89, 10),
        (Precision::W8a8, inputs, 80, 10),
    ] {
        for (config, attends) in [(&wide, CACHE), (&tiny_chat(), CACHE), (&tiny_chat(), Attends::Chunk)] {
            let name = format!("{precision}, {fp8_weights}, {attends:?}, {} wide", config.hidden_size);
            let options = LoweringOptions { fp8_weights, ..LoweringOptions::default() };
            // Not 1, which TensorRT would optimize away.
            let calibration = Calibration::uniform(0.01);
            let (graph, _) = optimized_graph(config, precision, SIZES.max_sequence_tokens, Some(&calibration)).unwrap();
            let log = Arc::new(KernelLog::new(Arc::new(())));
            let network = library.network(log.clone()).unwrap();
            let mut lowered = lower_with(&graph, network, attends, &SIZES, &Constants::Arbitrary, &options).unwrap();
            build(&mut lowered, Some(capability), true).unwrap();
            let kernels = log.kernels();
            assert_eq!(kernels.unread, [""; 0]);
            let step = kernels.profile(if attends == CACHE { 1 } else { 0 });
            let found = StepKernels::of(step, &lowered.bindings);
            println!("{name}: {} kernels, {:?} in each layer", found.launches, found.by_layer);
            if precision == Precision::Fp8 {
                decoded.push((fp8_weights, found.launches));
            }
            // Context prefill needs one more kernel, to transpose keys and values from the GEMM's to attention's
            // layout.
            let most = most + usize::from(attends == Attends::Chunk);
            let (last, others) = found.by_layer.split_last().unwrap();
            // Behind the last layer, whose outputs are gathered next, the outputs' scales of W8A8 take a kernel.
            let most_of_last = most + usize::from(precision == Precision::W8a8);
            let fits = others.iter().all(|launches| *launches <= most) && *last <= most_of_last;
            assert!(fits, "{name}: {:?}", found.by_layer);
            assert_eq!((found.weight_copies, found.cache_copies), (vec![], vec![]), "{name}");
            let codes = ["i8", "i4", "f8"];
            let products = step.iter().filter(|kernel| kernel.kind == KernelKind::Gemm);
            let reading = |kernel: &&GpuKernel| {
                let is_matrix = |input: &KernelTensor| input.dims.len() == 2 && input.dims.iter().all(|n| *n > 0);
                kernel
                    .inputs
                    .iter()
                    .chain(&kernel.constants)
                    .any(|input| is_matrix(input) && codes.contains(&input.dtype.as_str()))
            };
            assert_eq!(products.filter(reading).count(), 4 * config.num_layers, "{name}: GEMMs with codes");
            assert_eq!(step.iter().filter(reading).count(), 4 * config.num_layers, "{name}: kernels that read codes");
            if precision == Precision::W8a8 {
                // Products of integers: a library's GEMM of codes by codes, not one that dequantizes as it reads.
                for kernel in step.iter().filter(reading) {
                    let dtypes: Vec<&str> = kernel.inputs.iter().map(|input| input.dtype.as_str()).collect();
                    assert_eq!((kernel.layer_type.as_str(), &dtypes[..]), ("gemm", &["i8", "i8"][..]), "{kernel:?}");
                }
            }
            println!("{name}: {:?}, {} launches", found.by_layer, found.launches);
        }
    }
    // Codes as constants `[out, in]` take as many kernels as inputs `[in, out]`.
    let of =
        |kind| decoded.iter().filter(move |(of, _)| *of == kind).map(|(_, launches)| *launches).collect::<Vec<_>>();
    assert_eq!(of(inputs), of(constants));
}

/// A decode profile for each of several batches, as for TensorRT 11: each has the kernels of the one that serves all.
#[test]
fn decode_profiles_have_the_kernels_of_one() {
    let Some(library) = rtx("decode_profiles_have_the_kernels_of_one") else { return };
    let config = tiny_chat();
    let (graph, _) = optimized_graph(&config, Precision::Bf16, SIZES.max_sequence_tokens, None).unwrap();
    let listed = |decode_batches: &[usize]| {
        let options = LoweringOptions { decode_batches: decode_batches.to_vec(), ..LoweringOptions::default() };
        let log = Arc::new(KernelLog::new(Arc::new(())));
        let network = library.network(log.clone()).unwrap();
        let mut lowered = lower_with(&graph, network, CACHE, &SIZES, &Constants::Arbitrary, &options).unwrap();
        build(&mut lowered, SM_80, true).unwrap();
        let kernels = log.kernels();
        let of = |profile: &Vec<GpuKernel>| StepKernels::of(profile, &lowered.bindings).by_layer;
        (lowered.profiles.clone(), kernels.profiles.iter().map(of).collect::<Vec<_>>())
    };
    let (profiles, kernels) = listed(&[]);
    assert_eq!((profiles.len(), kernels.len()), (2, 2));
    let one = kernels[1].clone();
    // The plan's largest batch is 8, so 32 is none of its profiles'.
    let (profiles, kernels) = listed(&[2, 5, 8, 32]);
    let batches: Vec<[i64; 3]> = profiles[1..]
        .iter()
        .map(|profile| {
            let range = |name: &str| profile.ranges.iter().find(|range| range.input == name).unwrap();
            let (ids, rows) = (range("token_ids"), range("logits_rows"));
            let of = |range: &ShapeRange| [range.min[0], range.opt[0], range.max[0]];
            assert_eq!((of(ids), [ids.min[1], ids.opt[1], ids.max[1]]), (of(rows), [1, 1, 1]));
            of(ids)
        })
        .collect();
    assert_eq!(batches, [[1, 1, 2], [3, 5, 5], [6, 8, 8]]);
    assert_eq!(kernels[1..], vec![one; 3]);
}

/// In every precision, at two layers of the 8B's widths, a mask compiles to as many kernels and copies as lengths (in
/// cached prefill, to one more for all layers), and decoding to as many for every capacity. Prints what
/// docs/tensorrt.md has.
#[test]
fn a_mask_costs_no_kernel_and_no_copy() {
    let Some(library) = rtx("a_mask_costs_no_kernel_and_no_copy") else { return };
    let wide = two_wide_layers();
    let calibration = Calibration::uniform(0.01);
    let full = Sizes {
        max_sequence_tokens: 4096,
        position_tokens: 4096,
        decode_sequences: 28,
        prefill_sequences: 1,
        prefill_tokens: 512,
        ..SIZES
    };
    let steps = |config: &ModelConfig, precision, capability, input, capacity| -> [StepKernels; 2] {
        let sizes = full.at_capacity(capacity, 28 * 4096 / capacity);
        let (graph, _) = optimized_graph(config, precision, full.position_tokens, Some(&calibration)).unwrap();
        let log = Arc::new(KernelLog::new(Arc::new(())));
        let network = library.network(log.clone()).unwrap();
        let mut lowered = lower(&graph, network, Attends::Cache(input), &sizes, &Constants::Arbitrary).unwrap();
        build(&mut lowered, Some(capability), true).unwrap();
        let kernels = log.kernels();
        assert_eq!(kernels.unread, [""; 0]);
        [1, 0].map(|profile| StepKernels::of(kernels.profile(profile), &lowered.bindings))
    };
    for (precision, capability) in [
        (Precision::Bf16, 80),
        (Precision::Int8, 80),
        (Precision::Int4, 80),
        (Precision::Fp8, 89),
        (Precision::W8a8, 80),
    ] {
        let [mask, lengths] = [AttentionInput::Mask, AttentionInput::Lengths]
            .map(|input| steps(&wide, precision, capability, input, 4096));
        for (step, mask, lengths) in [("decode", &mask[0], &lengths[0]), ("cached prefill", &mask[1], &lengths[1])] {
            let found = |step: &StepKernels| {
                (step.launches, step.by_layer.clone(), step.weight_copies.len(), step.cache_copies.len())
            };
            println!("{precision}, {step}: mask {:?}, lengths {:?}", found(mask), found(lengths));
            assert_eq!(mask.cache_copies.len(), lengths.cache_copies.len(), "{precision}, {step}");
            // In prefill one kernel for all layers brings the mask into attention's layout.
            let more = usize::from(step != "decode");
            assert!((lengths.launches..=lengths.launches + more).contains(&mask.launches), "{precision}, {step}");
            assert_eq!(mask.weight_copies, []);
        }
        assert_eq!(mask[0].cache_copies, []);
        for capacity in [256, 512, 1024, 2048] {
            // The kernels do not depend on the widths, and narrow layers compile sooner.
            let narrow = ModelConfig { num_layers: 2, ..tiny_chat() };
            let [decode, prefill] = steps(&narrow, precision, capability, AttentionInput::Mask, capacity);
            println!("{precision}, class {capacity}: decode {:?}, prefill {:?}", decode.by_layer, prefill.by_layer);
            assert_eq!(
                (&decode.by_layer, decode.launches),
                (&mask[0].by_layer, mask[0].launches),
                "{precision} {capacity}"
            );
            assert_eq!((decode.weight_copies, decode.cache_copies), (vec![], vec![]), "{precision} {capacity}");
            assert_eq!(prefill.weight_copies, []);
        }
    }
}

/// Builds for SM 8.0 and lists the kernels.
fn kernels(
    library: &TensorRtLibrary,
    config: &ModelConfig,
    attends: Attends,
    sizes: &Sizes,
) -> (LoweredNetwork, SerializedPlan, Kernels) {
    let log = Arc::new(KernelLog::new(Arc::new(())));
    let mut lowered = lowered_model(library, log.clone(), config, attends, sizes);
    let plan = build(&mut lowered, SM_80, true).unwrap();
    let kernels = log.kernels();
    assert_eq!(kernels.unread, [""; 0]);
    (lowered, plan, kernels)
}

fn tiny_chat() -> ModelConfig {
    Checkpoint::open(Path::new(TINY_CHAT)).unwrap().config().clone()
}

#[test]
fn tiny_chat_builds_and_decodes_in_eight_kernels_a_layer() {
    let Some(library) = rtx("tiny_chat_builds_and_decodes_in_eight_kernels_a_layer") else { return };
    let config = tiny_chat();
    let (lowered, plan, kernels) = kernels(&library, &config, CACHE, &SIZES);
    assert!(plan.bytes().len() > 100_000, "{plan:?}");
    assert_eq!(kernels.profiles.len(), 2);
    // Per layer, from the first norm to relu² and residual; then the requested rows' norm, the head, TopK and the sums.
    let decode = StepKernels::of(kernels.profile(1), &lowered.bindings);
    assert_eq!(decode.by_layer, vec![8; config.num_layers], "{:#?}", kernels.profile(1));
    assert_eq!(decode.launches, 8 * config.num_layers + 4);
    assert_eq!((decode.weight_copies, decode.cache_copies), (vec![], vec![]));
    let prefill = StepKernels::of(kernels.profile(0), &lowered.bindings);
    assert_eq!(prefill.cache_copies.len(), 2 * config.num_layers, "one of the keys and one of the values");
    assert_eq!(prefill.weight_copies, []);
    let count = |kind| kernels.profile(1).iter().filter(|kernel| kernel.kind == kind).count();
    assert_eq!(count(KernelKind::Gemm), 4 * config.num_layers + 1);
    assert_eq!(count(KernelKind::Attention), config.num_layers);
}

/// Compares the bytes that decoding reads with the sizes of the model.
#[test]
fn tiny_chat_reads_its_weights_once() {
    let Some(library) = rtx("tiny_chat_reads_its_weights_once") else { return };
    let config = tiny_chat();
    let (lowered, _, kernels) = kernels(&library, &config, CACHE, &SIZES);
    let Traffic { weight_bytes, row_bytes, kv_bytes_per_token } =
        Traffic::of(kernels.profile(1), &lowered.bindings, &lowered.weights);
    let (hidden, layers) = (config.hidden_size, config.num_layers);
    let vectors = (2 * layers + 1) * 2 * hidden;
    let embedding = config.vocab_size * hidden;
    let matrices = config.parameters().unwrap() - vectors - embedding;
    assert_eq!(weight_bytes, (2 * matrices + 4 * vectors) as u64);
    assert_eq!(row_bytes, (2 * hidden + 2 * 4 * config.rotary_dim / 2) as u64);
    assert_eq!(kv_bytes_per_token, (2 * layers * config.num_kv_heads * config.head_dim * 2) as u64);
}

/// 8-bit codes stored `[out, in]`, as in the checkpoint, are transposed in every step; stored `[in, out]` they are not.
#[test]
fn a_weight_that_is_stored_the_wrong_way_is_copied() {
    let Some(library) = rtx("a_weight_that_is_stored_the_wrong_way_is_copied") else { return };
    let (tokens, inputs, outputs) = (8, 256, 512);
    let copies = |transposed: bool| {
        let log = Arc::new(KernelLog::new(Arc::new(())));
        let mut network = library.network(log.clone()).unwrap();
        let x = network.input("x", DType::BF16, &[tokens, inputs]).unwrap();
        let shape = if transposed { [inputs, outputs] } else { [outputs, inputs] };
        let codes = network.input("codes", DType::I8, &shape).unwrap();
        let scales = network.input("scales", DType::F32, &[outputs]).unwrap();
        let weight = network.dequantize(codes, scales, Some(u8::from(transposed)), DType::BF16).unwrap();
        let y = if transposed { network.matmul(x, weight) } else { network.linear(x, weight) }.unwrap();
        network.output(y, "y").unwrap();
        let options = BuildOptions { compute_capability: SM_80, list_kernels: true, ..BuildOptions::default() };
        network.build(&options).unwrap();
        let shape = shape.map(|n| Extent::Fixed(n as usize)).to_vec();
        let binding = Binding { name: "codes".into(), role: BindingRole::Weight, dtype: DType::I8, shape };
        let kernels = log.kernels();
        assert!(!kernels.profile(0).is_empty(), "{kernels:?}");
        StepKernels::of(kernels.profile(0), &[binding]).weight_copies
    };
    assert_eq!(copies(true), []);
    let [copy] = &copies(false)[..] else { panic!("{:?}", copies(false)) };
    assert_eq!(copy.of.as_deref(), Some("codes"));
}

/// `aotron inspect --network` of tiny-chat matches the golden file. After an intended change, update the file with
/// `UPDATE_GOLDEN=1 cargo test network_of_tiny` and review its diff.
#[test]
fn the_network_of_tiny_chat_is_as_it_was() {
    if rtx("the_network_of_tiny_chat_is_as_it_was").is_none() {
        return;
    }
    let path = Path::new("tests/data/golden/tiny-chat.network.txt");
    let arguments = ["inspect", TINY_CHAT, "--network", "--recipe", "a100", "--precision", "bf16"];
    let output = Command::new(env!("CARGO_BIN_EXE_aotron")).args(arguments).output().unwrap();
    let (network, errors) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{errors}");
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &network).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap();
    let difference = golden.lines().zip(network.lines()).enumerate().find(|(_, (was, is))| was != is);
    if let Some((line, (was, is))) = difference {
        panic!("{}, line {}, was\n{was}\nand is\n{is}\nUPDATE_GOLDEN=1 writes it anew", path.display(), line + 1);
    }
    assert_eq!(golden.lines().count(), network.lines().count(), "UPDATE_GOLDEN=1 writes {} anew", path.display());
}

/// Nemotron-3-8B compiles; its weights are not needed for that.
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
    let sizes =
        Sizes { max_sequence_tokens: 4096, position_tokens: 4096, prefill_sequences: 1, prefill_tokens: 512, ..SIZES };
    let (lowered, plan, kernels) = kernels(&library, &config, CACHE, &sizes);
    assert!(plan.bytes().len() < 100 << 20, "{plan:?} holds weights");
    let decode = StepKernels::of(kernels.profile(1), &lowered.bindings);
    assert_eq!(decode.by_layer, [8; 32], "{:#?}", kernels.profile(1));
    assert_eq!((decode.launches, decode.weight_copies, decode.cache_copies), (8 * 32 + 4, vec![], vec![]));
    let traffic = Traffic::of(kernels.profile(1), &lowered.bindings, &lowered.weights);
    assert_eq!(traffic.kv_bytes_per_token, 512 << 10);
    // Everything but the embedding: matrices in BF16, norms in FP32.
    let vectors = (2 * 32 + 1) * 2 * 4096;
    assert_eq!(traffic.weight_bytes, 2 * (8_540_135_424 - 256_000 * 4096 - vectors) + 4 * vectors);
}

#[test]
fn context_prefill_copies_no_cache() {
    let Some(library) = rtx("context_prefill_copies_no_cache") else { return };
    let config = tiny_chat();
    let (lowered, _, kernels) = kernels(&library, &config, Attends::Chunk, &SIZES);
    assert_eq!((lowered.profiles.len(), kernels.profiles.len()), (1, 1));
    let chunk = StepKernels::of(kernels.profile(0), &lowered.bindings);
    assert_eq!(chunk.by_layer, vec![9; config.num_layers], "{:#?}", kernels.profile(0));
    assert_eq!(chunk.launches, 9 * config.num_layers + 4);
    assert_eq!((chunk.weight_copies, chunk.cache_copies), (vec![], vec![]));
}

#[test]
fn grouped_queries_and_tied_embeddings_build() {
    let Some(library) = rtx("grouped_queries_and_tied_embeddings_build") else { return };
    // `gqa` and `odd` are left out: TensorRT for RTX 1.7 has no cached attention for head dimensions 12 and 13.
    for shape in ["theta", "wide"] {
        for attends in [CACHE, Attends::Chunk] {
            let mut lowered = lowered(&library, Arc::new(()), &format!("tests/data/shapes/{shape}"), attends);
            build(&mut lowered, SM_80, false).unwrap_or_else(|error| panic!("{shape}, {attends:?}: {error}"));
        }
    }
}

/// TensorRT for RTX 1.7 has no fused attention for heads wider than 256. It refuses such a plan in words that name
/// attention, and takes attention apart if allowed to.
#[test]
fn attention_without_a_fused_kernel_is_built_in_parts() {
    let Some(library) = rtx("attention_without_a_fused_kernel_is_built_in_parts") else { return };
    let wide = ModelConfig {
        hidden_size: 1024,
        num_heads: 2,
        num_kv_heads: 2,
        head_dim: 512,
        rotary_dim: 256,
        num_layers: 2,
        ..tiny_chat()
    };
    for (config, is_fused) in [(&wide, false), (&tiny_chat(), true)] {
        for attends in [CACHE, Attends::Chunk] {
            let log = Arc::new(KernelLog::new(Arc::new(())));
            let mut lowered = lowered_model(&library, log.clone(), config, attends, &SIZES);
            let profiles = lowered.profiles.clone();
            let options =
                BuildOptions { compute_capability: SM_80, list_kernels: true, profiles, ..Default::default() };
            let refused = lowered.network.build(&options).err().map(|error| error.to_string());
            assert_eq!(refused.is_none(), is_fused, "{attends:?}: {refused:?}");
            let (plan, reason) = lowered.network.build_or_decompose(&options).unwrap();
            assert!(plan.bytes().len() > 100_000, "{plan:?}");
            assert_eq!(reason.is_none(), is_fused, "{attends:?}: {reason:?}");
            let found = log.kernels();
            assert_eq!(found.unread, [""; 0]);
            let is_attention = |kernel: &&GpuKernel| kernel.kind == KernelKind::Attention;
            let attentions = found.profile(0).iter().filter(is_attention).count();
            assert_eq!(attentions > 0, is_fused, "{attends:?}");
        }
    }
}

#[test]
fn the_network_is_what_the_graph_says() {
    let Some(library) = rtx("the_network_is_what_the_graph_says") else { return };
    let config = tiny_chat();
    let lowered = lowered(&library, Arc::new(()), TINY_CHAT, CACHE);
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
    let [.., top, _, sums] = &layers[..] else { panic!("{layers:?}") };
    assert_eq!((sums.kind.as_str(), &sums.outputs[..]), ("reduce", &["logit_sums: f32[-1, 64]".to_owned()][..]));
    assert_eq!(top.inputs, [format!("logits: f32[-1, {}]", config.vocab_size)]);
    assert_eq!(top.outputs, ["top_logits: f32[-1, 64]", "top_ids: i32[-1, 64]"]);
    // Every weight exactly once: the embedding, the head, the final norm and two tables; per layer, four matrices and
    // two norms.
    assert_eq!(lowered.weights.len(), 6 + 8 * config.num_layers);
}

#[test]
fn errors_carry_the_words_of_tensorrt() {
    let Some(library) = rtx("errors_carry_the_words_of_tensorrt") else { return };
    let mut lowered = lowered(&library, Arc::new(()), TINY_CHAT, CACHE);
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
    // The network is unchanged, and a tensor index of another network is rejected.
    let wide = network.input("wide", DType::BF16, &[4, 3]).unwrap();
    let y = network.linear(x, wide).unwrap();
    let mut other = library.network(Arc::new(())).unwrap();
    let error = other.relu(y).unwrap_err().to_string();
    assert!(error.contains("the network has no tensor"), "{error}");
    let error = network.input("deep", DType::F32, &[1; 12]).unwrap_err().to_string();
    assert!(error.contains("12 dimensions"), "{error}");
    // Sizes whose bits, bytes or elements overflow are not taken for the few bytes that are left of them.
    for (dtype, dims) in [
        (DType::F32, &[1 << 59][..]),
        (DType::F32, &[1 << 58]),
        (DType::I4, &[1 << 61]),
        (DType::I8, &[1 << 32, 1 << 32]),
    ] {
        let bytes = ConstantBytes::of_memory([0u8; 4].into(), 0..0).unwrap();
        let error = network.constant(bytes, dtype, dims).unwrap_err().to_string();
        assert!(error.contains("a constant of impossible sizes") || error.contains("0 bytes, expected"), "{error}");
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let Some(library) = rtx("sizes_that_do_not_fit_are_refused") else { return };
    let config = tiny_chat();
    let (graph, _) = optimized_graph(&config, Precision::Bf16, SIZES.max_sequence_tokens, None).unwrap();
    for top_tokens in [0, 3841] {
        let sizes = Sizes { top_tokens, ..SIZES };
        let network = library.network(Arc::new(())).unwrap();
        let error = lower(&graph, network, CACHE, &sizes, &Constants::Arbitrary).unwrap_err().to_string();
        assert!(error.contains(&format!("top_tokens is {top_tokens}, accepted are 1 to 3840")), "{error}");
    }
    let sizes = Sizes { prefill_tokens: 0, ..SIZES };
    let mut lowered = lowered_model(&library, Arc::new(()), &config, CACHE, &sizes);
    let error = build(&mut lowered, SM_80, false).unwrap_err().to_string();
    assert!(error.starts_with("TensorRT: cannot "), "{error}");
}

#[test]
fn a_build_can_be_cancelled_and_repeated() {
    let Some(library) = rtx("a_build_can_be_cancelled_and_repeated") else { return };
    let recorder = Arc::new(Recorder { break_after: Some(2), ..Recorder::default() });
    let mut cancelled = lowered(&library, recorder.clone(), TINY_CHAT, CACHE);
    let error = build(&mut cancelled, SM_80, false).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let recorder = Arc::new(Recorder::default());
    let mut whole = lowered(&library, recorder.clone(), TINY_CHAT, CACHE);
    build(&mut whole, SM_80, false).unwrap();
    assert!(recorder.steps.load(Ordering::Relaxed) > 2, "the build reports its progress");
}

/// Compiles C code to a library in a folder.
fn stub(folder: &Path, kind: LibraryKind, code: &str) -> PathBuf {
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
    for kind in LibraryKind::ALL {
        let folder = tempfile::tempdir().unwrap();
        // SAFETY: what is opened is TensorRT, or no library at all.
        #[allow(unsafe_code)]
        let refused = |path: &Path| unsafe { TensorRtLibrary::open(kind, path) }.unwrap_err().to_string();

        let text = folder.path().join("text.so");
        std::fs::write(&text, "not a library").unwrap();
        assert!(refused(&text).contains("text.so"), "{}", refused(&text));
        assert!(refused(&folder.path().join("absent.so")).contains("absent.so"));

        let foreign = stub(folder.path(), kind, "int other(void) { return 1; }");
        let error = refused(&foreign);
        assert!(error.contains("no function getInferLibVersion, so it is a different library"), "{error}");

        let headers = kind.header_version().unwrap();
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
                // SAFETY: what is opened is TensorRT, or no library at all.
                #[allow(unsafe_code)]
                let library = unsafe { TensorRtLibrary::open(kind, &path) }.unwrap();
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
