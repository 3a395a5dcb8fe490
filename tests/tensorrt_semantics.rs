//! Numerics of the lowered network, without TensorRT: it is evaluated layer by layer ([`crate::evaluator`]) on the
//! packed weights and the manifest's bindings, through steps like those of a server, and its logits are compared with
//! those of the CPU plan of the same precision.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use aotron::backend::cpu::CpuOptions;
use aotron::backend::open_cpu;
use aotron::backend::packing;
use aotron::backend::tensorrt::lower::{
    ATTENTION_MASK, Attends, AttentionInput, Constants, Fp8Weights, LoweredNetwork, LoweringOptions, PlanWeight, Sizes,
    TOTAL_TOKENS, lower_with,
};
use aotron::backend::tensorrt::pack::{items, stored};
use aotron::backend::tensorrt::stage;
use aotron::checkpoint::Checkpoint;
use aotron::compile::{Calibration, Precision, Recipe, optimized_graph};
use aotron::engine::tensorrt::{Binding, BindingRole, Extent, StepSize};
use aotron::graph::Graph;
use aotron::tensor::DType;
use aotron::tensor_file::TensorFile;
use aotron::verify::{RowStats, limit_on_gpu, row_error};

use crate::evaluator::{Array, Element, Evaluator, Rounding};
use crate::numerics::score;
use crate::packages::build_calibrated;
use crate::verify::{VOCAB, grouped_checkpoint};

const TINY_CHAT: &str = "tests/data/tiny-chat";

/// A smaller cache than the CPU plans', so that nothing passes by having coincidentally equal shapes.
const SIZES: Sizes = Sizes {
    max_sequence_tokens: 48,
    position_tokens: 48,
    decode_sequences: 3,
    prefill_sequences: 2,
    prefill_tokens: 16,
    prefill_logits_rows: 8,
    top_tokens: 7,
};
const SLOTS: usize = 3;
const MASK: Attends = Attends::Cache(AttentionInput::Mask);
const LENGTHS: Attends = Attends::Cache(AttentionInput::Lengths);
/// Tokens per sequence in the steps below.
const TOKENS: usize = 24;

/// Graph, weights and bindings of a model's GPU plans.
struct Plans {
    graph: Graph,
    options: LoweringOptions,
    constants: Constants,
    /// Weights that are inputs, by name.
    weights: HashMap<String, Array>,
    /// Bindings of the main plan with a mask and with lengths, and of the context plan.
    bindings: [Vec<Binding>; 3],
    /// Keeps the weights file alive.
    _folder: tempfile::TempDir,
}

fn which(attends: Attends) -> usize {
    match attends {
        Attends::Cache(AttentionInput::Mask) => 0,
        Attends::Cache(AttentionInput::Lengths) => 1,
        Attends::Chunk => 2,
    }
}

impl Plans {
    fn new(checkpoint: &Checkpoint, precision: Precision, calibration: &Calibration, fp8_weights: Fp8Weights) -> Plans {
        let options = LoweringOptions { fp8_weights, ..LoweringOptions::default() };
        let config = checkpoint.config();
        let (graph, _) = optimized_graph(config, precision, SIZES.max_sequence_tokens, Some(calibration)).unwrap();
        let blank = |attends| {
            let inputs = match attends {
                LENGTHS => HashMap::from([(TOTAL_TOKENS.to_owned(), Array::new(DType::I32, &[1], [1.0]))]),
                MASK => {
                    let dims = [1, 1, 1, SIZES.max_sequence_tokens];
                    let all = vec![1.0; SIZES.max_sequence_tokens];
                    HashMap::from([(ATTENTION_MASK.to_owned(), Array::new(DType::Bool, &dims, all))])
                }
                Attends::Chunk => HashMap::new(),
            };
            let evaluator = Evaluator::blank(inputs);
            let lowered = lower_with(&graph, evaluator, attends, &SIZES, &Constants::Arbitrary, &options).unwrap();
            (lowered.weights, lowered.bindings)
        };
        let (weights, mask_bindings) = blank(MASK);
        let (length_weights, length_bindings) = blank(LENGTHS);
        let (chunk_weights, chunk_bindings) = blank(Attends::Chunk);
        assert!(weights == chunk_weights && weights == length_weights, "all plans read one file");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let mut bytes = Vec::new();
        let mut write = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        let file = packing::File { items: items(&weights).unwrap(), sink: &mut write };
        packing::pack(vec![file], checkpoint, false, &|_| Ok(())).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let file = TensorFile::open(&path).unwrap();
        let bindings = [mask_bindings, length_bindings, chunk_bindings];
        let arrays = bound_weights(&file, &weights, &bindings);
        let constants = match weights.iter().any(PlanWeight::is_staged) {
            true => {
                let path = folder.path().join("constants.safetensors");
                let mut bytes = Vec::new();
                let mut write = |piece: &[u8]| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                };
                stage::write(&weights, &file, &mut write).unwrap();
                std::fs::write(&path, bytes).unwrap();
                // What is not transposed is refused, though it has as many bytes.
                let constants = Constants::File(Arc::new(file));
                let evaluator = Evaluator::blank(HashMap::new());
                let refused = lower_with(&graph, evaluator, Attends::Chunk, &SIZES, &constants, &options);
                let error = refused.map(|_| ()).unwrap_err().to_string();
                assert!(error.contains("as a constant of a plan"), "{error}");
                TensorFile::open(&path).unwrap()
            }
            false => file,
        };
        let constants = Constants::File(Arc::new(constants));
        Plans { graph, options, constants, weights: arrays, bindings, _folder: folder }
    }
}

/// Reads the weights that the bindings name, checking the type and shape stored in the file.
fn bound_weights(file: &TensorFile, weights: &[PlanWeight], bindings: &[Vec<Binding>]) -> HashMap<String, Array> {
    let inputs: Vec<&PlanWeight> = weights.iter().filter(|weight| !weight.in_plan).collect();
    for bindings in bindings {
        let bound: Vec<&Binding> = bindings.iter().take_while(|binding| binding.role == BindingRole::Weight).collect();
        let all = bindings.iter().filter(|binding| binding.role == BindingRole::Weight);
        assert_eq!(all.count(), bound.len(), "weights are bound first");
        let same = |(binding, weight): (&&Binding, &&PlanWeight)| {
            let shape: Vec<Extent> = weight.shape.iter().map(|n| Extent::Fixed(*n)).collect();
            (&binding.name, binding.dtype, &binding.shape) == (&weight.name, weight.dtype, &shape)
        };
        assert!(bound.len() == inputs.len() && bound.iter().zip(&inputs).all(same), "{bound:?}");
    }
    assert_eq!(file.tensors().len(), weights.len());
    let array = |weight: &PlanWeight| {
        let (tensor, bytes) = file.tensor(&weight.name).unwrap();
        assert_eq!((tensor.dtype, tensor.shape.clone()), stored(weight).unwrap(), "{}", weight.name);
        let array = Array::of_bytes(weight.dtype, &tensor.shape, bytes).unwrap();
        assert!(array.values.iter().all(|value| value.is_finite()), "{}", weight.name);
        (weight.name.clone(), array)
    };
    inputs.into_iter().map(array).collect()
}

/// The new tokens of one sequence in a step.
#[derive(Clone, Copy)]
struct Row {
    slot: usize,
    sequence: usize,
    past_tokens: usize,
    /// An idle row of a decode step: its one token is written at the end of the slot's sequence and attends to one key.
    idle: bool,
    /// The step's tokens after this many are padding: token 0, whose keys and values nothing reads.
    tokens: usize,
}

/// `slot`, the same sequence, so many tokens.
fn row(slot: usize, past_tokens: usize) -> Row {
    Row { slot, sequence: slot, past_tokens, idle: false, tokens: usize::MAX }
}

fn padded(slot: usize, past_tokens: usize, tokens: usize) -> Row {
    Row { tokens, ..row(slot, past_tokens) }
}

fn idle(slot: usize, past_tokens: usize) -> Row {
    Row { idle: true, ..row(slot, past_tokens) }
}

/// Plans, the memory their caches are bound to, and the expected logits.
struct Device<'p> {
    plans: &'p Plans,
    rounding: Rounding,
    /// Caches `[SLOTS, kv_heads, S, head_dim]`, by role; NaN where nothing was written.
    caches: HashMap<BindingRole, Array>,
    sequences: &'p [Vec<u32>],
    /// Expected logits of each sequence, `[tokens, vocab]`.
    expected: &'p [Vec<f32>],
    /// Largest difference so far, relative to the row's largest logit.
    error: f32,
    /// Largest error so far as `aotron verify` measures it.
    verify_error: f32,
    /// Number of rows whose most likely token leads by more than the tolerance.
    clear: usize,
    tolerance: f32,
    /// Input of the plan that reads the cache.
    attention: AttentionInput,
}

impl Device<'_> {
    /// Prefill without a past on both plans, later chunks at different lengths, decoding with an idle row, and slot
    /// reuse.
    fn run(&mut self) {
        let cache = Attends::Cache(self.attention);
        self.step(Attends::Chunk, &[row(0, 0), row(1, 0)], 11, &[21, 0, 10, 11, 5]);
        self.step(cache, &[row(2, 0)], 4, &[3, 0]);
        self.step(cache, &[row(2, 4), row(0, 11)], 6, &[8, 5, 11, 0]);
        self.step(cache, &[row(0, 17), row(1, 11), row(2, 10)], 1, &[2, 0, 1]);
        self.step(cache, &[row(0, 18), idle(1, 12), row(2, 11)], 1, &[0, 2, 1]);
        self.step(cache, &[row(0, 19), row(1, 12), row(2, 12)], 1, &[1, 2, 0]);
        self.step(cache, &[row(2, 13), row(0, 20)], 1, &[1, 0]);
        // Runs of a fixed length, of which the tokens do not fill all: padding overtakes no token, and what it leaves in
        // the cache is overwritten before it is read.
        self.step(Attends::Chunk, &[padded(1, 0, 5), padded(2, 0, 7)], 8, &[4, 14, 3]);
        self.step(cache, &[padded(1, 5, 3), padded(2, 7, 6)], 8, &[2, 13, 1]);
        self.step(cache, &[row(2, 13), row(1, 8)], 1, &[1, 0]);
        // Sequence 0 in the slot of the longer sequence 1, whose last tokens remain in the cache.
        let again = |past_tokens| Row { slot: 1, ..row(0, past_tokens) };
        self.step(Attends::Chunk, &[again(0)], 3, &[2]);
        self.step(cache, &[again(3)], 5, &[4, 0]);
        self.step(cache, &[row(2, 14), again(8)], 1, &[1, 0]);
    }

    /// Runs a step of `tokens` tokens per row. `wanted` holds the indices of the requested logits rows.
    fn step(&mut self, attends: Attends, rows: &[Row], tokens: usize, wanted: &[usize]) {
        let bindings = &self.plans.bindings[which(attends)];
        let dims = |binding: &Binding| -> Vec<usize> {
            let size = |extent: &Extent| match extent {
                Extent::Fixed(n) => *n,
                Extent::Step(StepSize::B) => rows.len(),
                Extent::Step(StepSize::T) => tokens,
                Extent::Step(StepSize::R) => wanted.len(),
            };
            binding.shape.iter().map(size).collect()
        };
        let inputs = bindings.iter().filter(|binding| binding.role != BindingRole::Weight && !binding.role.is_output());
        let inputs: HashMap<String, Array> =
            inputs.map(|b| (b.name.clone(), self.input(b, &dims(b), rows, tokens, wanted))).collect();
        let evaluator = Evaluator::new(inputs, &self.plans.weights, self.rounding);
        let LoweredNetwork { network, .. } =
            lower_with(&self.plans.graph, evaluator, attends, &SIZES, &self.plans.constants, &self.plans.options)
                .unwrap();
        let outputs = network.finish();
        let mut by_role = HashMap::new();
        for binding in bindings.iter().filter(|binding| binding.role.is_output()) {
            let output = &outputs[&binding.name];
            assert_eq!((output.element, &output.dims), (Element::Stored(binding.dtype), &dims(binding)), "{binding}");
            by_role.insert(binding.role, output);
            // An updated cache aliases the cache.
            let cache = match binding.role {
                BindingRole::UpdatedKeys(layer) => BindingRole::KeyCache(layer),
                BindingRole::UpdatedValues(layer) => BindingRole::ValueCache(layer),
                _ => continue,
            };
            let cache = self.caches.get_mut(&cache).unwrap();
            let length: usize = output.dims[1..].iter().product();
            let mut values = cache.values.to_vec();
            for (index, row) in rows.iter().enumerate() {
                values[row.slot * length..][..length].copy_from_slice(&output.values[index * length..][..length]);
            }
            cache.values = values.into();
        }
        assert_eq!(by_role.len(), outputs.len());
        let [logits, top, ids, sums] =
            [BindingRole::Logits, BindingRole::TopLogits, BindingRole::TopIds, BindingRole::LogitSums]
                .map(|role| by_role[&role]);
        for (index, wanted) in wanted.iter().enumerate() {
            let of = |output: &Array| {
                let width = output.dims[1];
                output.values[index * width..][..width].to_vec()
            };
            let (logits, top, ids, sums) = (of(logits), of(top), of(ids), of(sums));
            assert_eq!(sums.iter().sum::<f32>().is_finite(), logits.iter().all(|logit| logit.is_finite()));
            assert!(logits.iter().all(|logit| logit.is_finite()), "{attends:?}: row {wanted} read what is not there");
            check_top(&logits, &top, &ids);
            let row = rows[wanted / tokens];
            if !row.idle {
                self.compare(&logits, row.sequence, row.past_tokens + wanted % tokens);
            }
        }
    }

    fn input(&mut self, of: &Binding, dims: &[usize], rows: &[Row], tokens: usize, wanted: &[usize]) -> Array {
        let is_padding = |row: &Row, t: usize| row.idle || t >= row.tokens;
        let token = |row: &Row, t: usize| {
            if is_padding(row, t) { 0 } else { self.sequences[row.sequence][row.past_tokens + t] }
        };
        let total = |row: &Row| if row.idle { 1 } else { row.past_tokens + tokens };
        let each = |of: &dyn Fn(&Row, usize) -> usize| -> Vec<f32> {
            rows.iter().flat_map(|row| (0..tokens).map(|t| of(row, t) as f32)).collect()
        };
        let values = match of.role {
            BindingRole::TokenIds => each(&|row, t| token(row, t) as usize),
            BindingRole::Positions => each(&|row, t| row.past_tokens + t),
            BindingRole::PastTokens => rows.iter().map(|row| row.past_tokens as f32).collect(),
            BindingRole::TotalTokens => rows.iter().map(|row| total(row) as f32).collect(),
            BindingRole::AttentionMask => {
                let sees = |row: &Row, t: usize, key: usize| key < total(row) + t + 1 - tokens;
                let keys = |row: &Row, t: usize| (0..dims[3]).map(|key| sees(row, t, key) as usize as f32).collect();
                let queries = rows.iter().flat_map(|row| (0..tokens).map(move |t| (row, t)));
                queries.flat_map(|(row, t)| -> Vec<f32> { keys(row, t) }).collect()
            }
            BindingRole::LogitsRows => wanted.iter().map(|row| *row as f32).collect(),
            BindingRole::KeyCache(_) | BindingRole::ValueCache(_) => {
                let length: usize = dims[1..].iter().product();
                let unwritten =
                    || Array::new(of.dtype, &[&[SLOTS], &dims[1..]].concat(), vec![f32::NAN; SLOTS * length]);
                let cache = self.caches.entry(of.role).or_insert_with(unwritten);
                rows.iter().flat_map(|row| cache.values[row.slot * length..][..length].iter().copied()).collect()
            }
            role => panic!("{role:?} is no step's input"),
        };
        Array::new(of.dtype, dims, values)
    }

    fn compare(&mut self, logits: &[f32], sequence: usize, position: usize) {
        let expected = &self.expected[sequence][position * logits.len()..][..logits.len()];
        let largest = expected.iter().fold(0f32, |most, v| most.max(v.abs()));
        let worst = logits.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let error = worst / largest;
        self.error = self.error.max(error);
        assert!(error < self.tolerance, "sequence {sequence}, position {position}: {error:e}");
        self.verify_error = self.verify_error.max(row_error(logits, expected, RowStats::of(expected)).0);
        let (best, runner_up) = (first(expected, None), first(expected, Some(first(expected, None))));
        if expected[best] - expected[runner_up] > self.tolerance * largest {
            self.clear += 1;
            assert_eq!(first(logits, None), best, "sequence {sequence}, position {position}");
        }
    }
}

/// Index of the largest element, optionally excluding one.
fn first(logits: &[f32], but: Option<usize>) -> usize {
    let others = (0..logits.len()).filter(|index| Some(*index) != but);
    others.max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap()
}

fn check_top(logits: &[f32], top: &[f32], ids: &[f32]) {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    assert_eq!(top, &sorted[..top.len()]);
    assert_eq!(ids.len(), top.len());
    ids.iter().zip(top).for_each(|(id, logit)| assert_eq!(logits[*id as usize], *logit));
    assert!((1..ids.len()).all(|index| !ids[..index].contains(&ids[index])));
}

/// Tolerance for a row's logits, relative to the largest of them.
fn tolerance(precision: Precision, rounding: Rounding) -> f32 {
    match (precision, rounding) {
        (Precision::F32, _) => 1e-5,
        // The same values are rounded, and nearly all of them to the same result; another summation order moves a few
        // to the adjacent value: a relative change of 2⁻⁸ in BF16, 2⁻³ in E4M3.
        (Precision::Fp8, Rounding::AsCpu) => 4e-2,
        (_, Rounding::AsCpu) => 1e-2,
        // The network also rounds to BF16 what the CPU keeps in FP32: GEMM results (the head's included), dequantized
        // weights, queries and probabilities. Each causes relative errors of up to 2⁻⁹.
        (Precision::Fp8 | Precision::W8a8, _) => 2.5e-1,
        (_, _) => 3e-2,
    }
}

/// Evaluates a model's plans in one precision with each kind of rounding. Returns how many rows had a clear winner.
fn check(checkpoint: &str, precision: Precision, sequences: &[Vec<u32>]) -> usize {
    check_within(checkpoint, precision, sequences, 1.0)
}

/// As [`check`], with this many times the tolerance.
fn check_within(checkpoint: &str, precision: Precision, sequences: &[Vec<u32>], times: f32) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let (package, calibration) = build_calibrated(Path::new(checkpoint), precision, &folder.path().join("engine"));
    let recipe = Recipe { precision, ..Recipe::load("cpu").unwrap() };
    let calibration = calibration.without(recipe.kept_in_bf16());
    let mut executor = open_cpu(&package, &CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    let expected: Vec<Vec<f32>> = sequences.iter().map(|ids| score(&mut executor, 0, ids, 8)).collect();
    let opened = Checkpoint::open(Path::new(checkpoint)).unwrap();
    let kinds = match precision {
        Precision::Fp8 => &[Fp8Weights::Inputs, Fp8Weights::Constants][..],
        _ => &[Fp8Weights::Inputs],
    };
    let plans: Vec<Plans> = kinds.iter().map(|kind| Plans::new(&opened, precision, &calibration, *kind)).collect();
    let mut clear = 0;
    let inputs = [AttentionInput::Mask, AttentionInput::Lengths];
    let all = [Rounding::AsCpu, Rounding::Results, Rounding::Scores];
    let cases = inputs.into_iter().flat_map(|input| all.map(|rounding| (input, rounding)));
    for (plans, (attention, rounding)) in plans.iter().flat_map(|plans| cases.clone().map(move |case| (plans, case))) {
        let mut device = Device {
            plans,
            rounding,
            caches: HashMap::new(),
            sequences,
            expected: &expected,
            error: 0.0,
            verify_error: 0.0,
            clear: 0,
            tolerance: tolerance(precision, rounding) * times,
            attention,
        };
        device.run();
        let Device { error, verify_error, clear: rows, .. } = device;
        println!(
            "{checkpoint} {precision} {} {attention} {rounding:?}: {error:.1e}, {rows} clear, verify {verify_error:.1e}",
            plans.options.fp8_weights
        );
        let layers = package.manifest().model.num_layers;
        let limit = limit_on_gpu(&precision.to_string(), layers);
        assert!(1.5 * verify_error < limit, "{checkpoint} {precision} {rounding:?}: {verify_error:e} of {limit:e}");
        clear += rows;
    }
    clear
}

/// The first tokens of three conversations.
fn conversations() -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(Path::new(TINY_CHAT).join("answers.jsonl")).unwrap();
    let ids = |line: &str| -> Vec<u32> {
        let turn: serde_json::Value = serde_json::from_str(line).unwrap();
        let part = |name: &str| -> Vec<u32> { serde_json::from_value(turn["turns"][0][name].clone()).unwrap() };
        [part("prompt_ids"), part("token_ids")].concat()
    };
    let long = text.lines().map(ids).filter(|ids| ids.len() >= TOKENS).map(|ids| ids[..TOKENS].to_vec());
    long.take(SLOTS).collect()
}

#[test]
fn tiny_chat_is_what_the_cpu_computes() {
    for precision in Precision::ALL {
        let clear = check(TINY_CHAT, precision, &conversations());
        assert!(clear >= 30, "the conversations have clear answers: {clear}");
    }
}

#[test]
fn every_shape_is_what_the_cpu_computes() {
    for shape in ["theta", "wide", "odd", "gqa"] {
        let checkpoint = format!("tests/data/shapes/{shape}");
        let vocab = Checkpoint::open(Path::new(&checkpoint)).unwrap().config().vocab_size as u32;
        let id = |sequence: u32, i: u32| (sequence * 31 + i * i * 7 + i * 13) % vocab;
        let ids = |sequence: u32| (0..TOKENS as u32).map(|i| id(sequence, i)).collect();
        let sequences: Vec<Vec<u32>> = (0..SLOTS as u32).map(ids).collect();
        for precision in Precision::ALL {
            // Its 101 outputs cannot be stored as pairs of 4-bit codes.
            if shape != "odd" || precision != Precision::Int4 {
                check(&checkpoint, precision, &sequences);
            }
        }
    }
}

/// Models whose layers all matter, shallow and deep: the limits of `aotron verify` must hold for them too. The tolerance
/// of the other comparisons is for models of few layers.
#[test]
fn the_limits_hold_at_any_depth() {
    for layers in [4, 32] {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join(format!("layers-{layers}"));
        grouped_checkpoint(&checkpoint, layers);
        let ids =
            |sequence: u32| (0..TOKENS as u32).map(|i| (sequence * 31 + i * i * 7 + i * 13) % VOCAB as u32).collect();
        let sequences: Vec<Vec<u32>> = (0..SLOTS as u32).map(ids).collect();
        for precision in [Precision::Bf16, Precision::Fp8] {
            check_within(checkpoint.to_str().unwrap(), precision, &sequences, 6.0);
        }
    }
}
