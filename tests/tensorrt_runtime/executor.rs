//! The executor on the fake libraries. A process opens these once, so each test runs in a process of its own: an
//! ignored test, started by one that sets its environment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use aotron::backend::tensorrt::{GpuEvent, GpuOptions, GpuReport, KernelCompilation, TensorRtExecutor, devices};
use aotron::backend::{self, Chunk, Executor, ExecutorOptions, NextToken, Rows, Step};
use aotron::checkpoint::Checkpoint;
use aotron::engine::tensorrt::{
    Binding, BindingRole, CapacityClass, Compiled, Extent, LibraryKind, Sizes, StepSize, TensorRtInfo,
};
use aotron::engine::{CheckpointInfo, GenerationSettings, Limits, Manifest, Package, PackageWriter, PlanInfo};
use aotron::tensor::DType;
use aotron::tensor_file::encode_header;
use aotron::text::ChatFormat;
use safetensors::tensor::Dtype;

const VOCAB: usize = 200;
const TOP: usize = 8;
const SUMS: usize = 4;
const LAYERS: usize = 2;
const WEIGHTS: [usize; 5] = [300, 1, 77, 4096, 5];
const SIZES: Sizes = Sizes {
    max_sequence_tokens: 64,
    position_tokens: 64,
    decode_sequences: 6,
    prefill_sequences: 2,
    prefill_tokens: 8,
    prefill_logits_rows: 3,
    top_tokens: TOP,
};

/// A folder with the fake driver and both fake libraries, compiled once per process.
pub fn stand_ins() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let compile = || {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tensorrt_runtime/fakes");
        for (file, header, more, library) in [
            ("cuda.cpp", "", "-DFAKE", "libcuda.so.1"),
            ("tensorrt_rtx.cpp", env!("AOTRON_TENSORRT_RTX_HEADER"), "-DFAKE_RTX=1", "libtensorrt_rtx.so.1"),
            ("tensorrt_rtx.cpp", env!("AOTRON_TENSORRT_HEADER"), "-DFAKE_RTX=0", "libnvinfer.so.11"),
        ] {
            let header = format!("-DAOTRON_HEADER=\"{header}\"");
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
            let done = Command::new(compiler)
                .args(["-std=c++17", "-O2", "-shared", "-fPIC", "-w", "-Icpp/cuda", &header, more])
                .arg(source.join(file))
                .args(["-ldl", "-o"])
                .arg(folder.path().join(library))
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .status()
                .unwrap();
            assert!(done.success());
        }
        folder
    };
    FOLDER.get_or_init(compile).path()
}

/// Runs an ignored test of this file on the fakes, and returns its output.
fn run(test: &str, environment: &[(&str, &str)]) -> String {
    run_in("executor", test, environment)
}

/// Runs an ignored test of a module beside this one on the fakes, and returns its output.
pub fn run_in(module: &str, test: &str, environment: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", &format!("tensorrt_runtime::{module}::{test}")])
        .env("LD_LIBRARY_PATH", stand_ins())
        .env("AOTRON_TENSORRT_DIR", stand_ins())
        .env("AOTRON_TEST_FOLDER", folder.path())
        .env("XDG_CACHE_HOME", folder.path().join("cache"))
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    text
}

pub fn folder() -> PathBuf {
    std::env::var_os("AOTRON_TEST_FOLDER").expect("run by another test").into()
}

/// Returns true if plans have lengths instead of a mask.
fn by_lengths() -> bool {
    std::env::var_os("AOTRON_TEST_LENGTHS").is_some()
}

/// Capacity classes below the largest, and their largest batches.
fn smaller() -> &'static [(usize, usize)] {
    if std::env::var_os("AOTRON_TEST_ONE_CLASS").is_some() { &[] } else { &[(32, 6)] }
}

fn bindings(capacity: usize) -> Vec<Binding> {
    use Extent::{Fixed, Step};
    use StepSize::{B, R, T};
    let binding = |name: String, role, dtype, shape: &[Extent]| Binding { name, role, dtype, shape: shape.to_vec() };
    let weight =
        |(i, n): (usize, &usize)| binding(format!("weight.{i}"), BindingRole::Weight, DType::BF16, &[Fixed(*n)]);
    let mut all: Vec<Binding> = WEIGHTS.iter().enumerate().map(weight).collect();
    all.extend([
        binding("token_ids".into(), BindingRole::TokenIds, DType::I32, &[Step(B), Step(T)]),
        binding("positions".into(), BindingRole::Positions, DType::I32, &[Step(B), Step(T)]),
        binding("past_tokens".into(), BindingRole::PastTokens, DType::I32, &[Step(B)]),
        match by_lengths() {
            true => binding("total_tokens".into(), BindingRole::TotalTokens, DType::I32, &[Step(B)]),
            false => binding(
                "attention_mask".into(),
                BindingRole::AttentionMask,
                DType::Bool,
                &[Step(B), Fixed(1), Step(T), Fixed(capacity)],
            ),
        },
        binding("logits_rows".into(), BindingRole::LogitsRows, DType::I32, &[Step(R)]),
        binding("logits".into(), BindingRole::Logits, DType::F32, &[Step(R), Fixed(VOCAB)]),
        binding("top_logits".into(), BindingRole::TopLogits, DType::F32, &[Step(R), Fixed(TOP)]),
        binding("top_ids".into(), BindingRole::TopIds, DType::I32, &[Step(R), Fixed(TOP)]),
        binding("logit_sums".into(), BindingRole::LogitSums, DType::F32, &[Step(R), Fixed(SUMS)]),
    ]);
    let cache = [Step(B), Fixed(3), Fixed(capacity), Fixed(4)];
    for layer in 0..LAYERS {
        for (name, role) in [
            (format!("keys.{layer}"), BindingRole::KeyCache(layer)),
            (format!("values.{layer}"), BindingRole::ValueCache(layer)),
            (format!("new_keys.{layer}"), BindingRole::UpdatedKeys(layer)),
            (format!("new_values.{layer}"), BindingRole::UpdatedValues(layer)),
        ] {
            all.push(binding(name, role, DType::BF16, &cache));
        }
    }
    all
}

/// A plan in the fake library's text format.
fn plan_text(context_plan: bool) -> String {
    class_text(context_plan, SIZES.max_sequence_tokens, SIZES.decode_sequences)
}

fn class_text(context_plan: bool, capacity: usize, decode_sequences: usize) -> String {
    fake_plan(&bindings(capacity), context_plan, &Sizes { decode_sequences, ..SIZES })
}

/// A plan with these bindings in the fake library's text format.
pub(super) fn fake_plan(bindings: &[Binding], context_plan: bool, sizes: &Sizes) -> String {
    let mut text = String::new();
    for binding in bindings.iter().filter(|b| !(context_plan && b.role.limits_cached_keys())) {
        let role = match binding.role {
            BindingRole::Weight => "weight",
            BindingRole::KeyCache(_) | BindingRole::ValueCache(_) => "cache",
            BindingRole::UpdatedKeys(_) | BindingRole::UpdatedValues(_) => "updated",
            _ => binding.name.as_str(),
        };
        let alias = binding.name.strip_prefix("new_").unwrap_or("-");
        let kind = if binding.role.is_output() { "output" } else { "input" };
        text += &format!("{kind} {role} {} {} {alias} {}", binding.name, binding.dtype, binding.shape.len());
        for extent in &binding.shape {
            text += &match extent {
                Extent::Fixed(n) => format!(" {n}"),
                Extent::Step(_) => " -1".to_owned(),
            };
        }
        text.push('\n');
    }
    text += &format!("profile {} {} {}\n", sizes.prefill_sequences, sizes.prefill_tokens, sizes.prefill_logits_rows);
    if !context_plan {
        text += &format!("profile {n} 1 {n}\n", n = sizes.decode_sequences);
    }
    text
}

fn weight_bytes() -> Vec<u8> {
    (0..2 * WEIGHTS.iter().sum::<usize>()).map(|i| (i * i + 3 * i) as u8).collect()
}

/// A package with one plan, for GPU 1 of the fake driver, at `name` in the test's folder.
fn package(name: &str, plan: &str) -> Package {
    let path = folder().join(name);
    let mut writer = PackageWriter::create(&path, false).unwrap();
    let tensors: Vec<(String, Dtype, Vec<usize>)> =
        WEIGHTS.iter().enumerate().map(|(i, n)| (format!("weight.{i}"), Dtype::BF16, vec![*n])).collect();
    let tensors: Vec<(&str, Dtype, Vec<usize>)> = tensors.iter().map(|(n, d, s)| (n.as_str(), *d, s.clone())).collect();
    let files = [
        ("plans/a100.plan", plan.as_bytes().to_vec()),
        ("plans/a100-context.plan", plan_text(true).into_bytes()),
        ("weights/bf16.safetensors", [encode_header(&tensors).unwrap(), weight_bytes()].concat()),
    ];
    let class_file = |capacity: usize, context: &str| format!("plans/a100-{capacity}{context}.plan");
    let of_classes = smaller().iter().flat_map(|(capacity, batch)| {
        [false, true].map(|context| {
            let name = class_file(*capacity, if context { "-context" } else { "" });
            (name, class_text(context, *capacity, *batch).into_bytes())
        })
    });
    let files = files.into_iter().map(|(file, bytes)| (file.to_owned(), bytes)).chain(of_classes);
    for (file, bytes) in files {
        let file = file.as_str();
        writer.add(file, |write| write(&bytes)).unwrap();
    }
    let model = Checkpoint::open(Path::new("tests/data/tiny-chat")).unwrap().config().clone();
    let checkpoint = CheckpointInfo { format: "hugging-face".into(), digest: "sha256:0".into() };
    let generation = GenerationSettings { max_tokens: 8, ..GenerationSettings::default() };
    let mut manifest = Manifest::new(model, checkpoint, ChatFormat::raw(&[]), generation);
    manifest.plans.push(PlanInfo {
        target: "a100".into(),
        precision: "bf16".into(),
        plan: Some("plans/a100.plan".into()),
        weights: "weights/bf16.safetensors".into(),
        limits: Limits {
            slots: SIZES.decode_sequences,
            max_sequence_tokens: SIZES.max_sequence_tokens,
            max_step_tokens: 30,
            max_logits_rows: 20,
            vocab_size: VOCAB,
        },
        kv_bytes_per_token: LAYERS * 2 * 3 * 4 * 2,
        recipe: String::new(),
        tensorrt: Some(TensorRtInfo {
            compute_capability: 80,
            compiled: Some(Compiled {
                library: LibraryKind::Rtx,
                version: "1.7.1".into(),
                gpu: None,
                context_plan: Some("plans/a100-context.plan".into()),
                decode_batches: Vec::new(),
            }),
            sizes: SIZES,
            smaller_classes: smaller()
                .iter()
                .map(|(capacity, batch)| CapacityClass {
                    capacity_tokens: *capacity,
                    decode_sequences: *batch,
                    plan: Some(class_file(*capacity, "")),
                    context_plan: Some(class_file(*capacity, "-context")),
                })
                .collect(),
            bindings: bindings(SIZES.max_sequence_tokens),
            kv_cache_gib: BTreeMap::from([(40, 16)]),
            activation_scales: BTreeMap::new(),
        }),
    });
    writer.finish(&mut manifest).unwrap();
    Package::open(&path).unwrap()
}

/// The row of logits that the fake library returns for a sequence.
fn expected(tokens: &[u32]) -> Vec<f32> {
    let weights = weight_bytes().iter().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(*byte)));
    let hash = tokens.iter().fold(weights, |hash, token| hash.wrapping_mul(31).wrapping_add(token + 1));
    (0..VOCAB as u32).map(|v| ((hash ^ v.wrapping_mul(2_654_435_761)) >> 8) as f32).collect()
}

/// A report callback, and the facts it records.
fn listening() -> (GpuReport, Arc<Mutex<Vec<String>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let copy = heard.clone();
    let hear = move |event: &GpuEvent<'_>| match event {
        GpuEvent::Fact(text) => copy.lock().unwrap().push((*text).to_owned()),
        GpuEvent::Loading { done_bytes, total_bytes } => assert!(done_bytes <= total_bytes),
        GpuEvent::Compiling { done, total } => assert!(done <= total),
    };
    (GpuReport::to(hear), heard)
}

/// A pseudo-random number generator.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Adds, extends, truncates and replaces sequences, in prefill steps of many shapes and decode steps of any slots.
fn run_steps(executor: &mut dyn Executor, steps: usize) {
    let limits = executor.limits().clone();
    let mut sequences: Vec<Vec<u32>> = vec![Vec::new(); limits.slots];
    let mut dice = Dice(7);
    let mut ran = 0;
    while ran < steps {
        let decodes = dice.below(3) > 0;
        let mut named: Vec<(usize, usize, Vec<u32>, Rows)> = Vec::new();
        for (slot, sequence) in sequences.iter().enumerate() {
            let known = sequence.len();
            if dice.below(2) == 0 || (decodes && known == 0) {
                continue;
            }
            let cut = if dice.below(6) == 0 { dice.below(known + 1) } else { known };
            let past = cut.min(limits.max_sequence_tokens - 1);
            let most = if decodes { 1 } else { (limits.max_sequence_tokens - past).min(13) };
            let count = 1 + dice.below(most);
            let tokens = (0..count).map(|_| dice.below(VOCAB) as u32).collect();
            let rows = [Rows::None, Rows::Last, Rows::Last, Rows::All][dice.below(4)];
            named.insert(dice.below(named.len() + 1), (slot, past, tokens, rows));
        }
        let step = if decodes {
            let next = |(slot, past, tokens, _): &(usize, usize, Vec<u32>, Rows)| NextToken {
                slot: *slot,
                past_tokens: *past,
                token: tokens[0],
            };
            Step::decode(&limits, &named.iter().map(next).collect::<Vec<_>>())
        } else {
            let chunks: Vec<Chunk<'_>> = named
                .iter()
                .map(|(slot, past, tokens, rows)| Chunk { slot: *slot, past_tokens: *past, tokens, rows: *rows })
                .collect();
            Step::prefill(&limits, &chunks)
        };
        let Ok(step) = step else { continue };
        ran += 1;
        let mut wanted = Vec::new();
        for (slot, past, tokens, rows) in &named {
            let sequence = &mut sequences[*slot];
            sequence.truncate(*past);
            for (index, token) in tokens.iter().enumerate() {
                sequence.push(*token);
                if decodes || *rows == Rows::All || (*rows == Rows::Last && index + 1 == tokens.len()) {
                    wanted.push(expected(sequence));
                }
            }
        }
        let mut logits = executor.forward(&step).unwrap();
        assert_eq!(logits.rows(), wanted.len());
        for (row, wanted) in wanted.iter().enumerate() {
            let top = logits.top(row).unwrap();
            let mut ids: Vec<u32> = (0..VOCAB as u32).collect();
            ids.sort_by(|x, y| wanted[*y as usize].total_cmp(&wanted[*x as usize]));
            assert_eq!(top.ids, &ids[..TOP], "row {row} of step {ran}: {step:?}");
            let values: Vec<f32> = ids[..TOP].iter().map(|id| wanted[*id as usize]).collect();
            assert_eq!(top.values, values);
        }
        if !wanted.is_empty() {
            let row = dice.below(wanted.len());
            assert_eq!(logits.row(row).unwrap(), wanted[row]);
        }
    }
}

#[test]
fn steps_give_what_their_sequences_give() {
    let text = run("on_stand_ins_steps_run", &[]);
    assert!(text.contains("kept kernels were taken"), "{text}");
    run("on_stand_ins_steps_run", &[("FAKE_NO_CAPTURE", "1")]);
    run("on_stand_ins_steps_run", &[("AOTRON_TEST_LENGTHS", "1")]);
    run("on_stand_ins_steps_run", &[("AOTRON_TEST_ONE_CLASS", "1")]);
}

#[test]
#[ignore = "run by steps_give_what_their_sequences_give"]
fn on_stand_ins_steps_run() {
    let package = package("whole", &plan_text(false));
    let (report, heard) = listening();
    let gpu = GpuOptions { report, ..GpuOptions::default() };
    let options = ExecutorOptions { gpu, ..ExecutorOptions::default() };
    let mut executor = backend::open(&package, &options).unwrap();
    let facts = heard.lock().unwrap().clone();
    assert_eq!(facts[0], "plan a100 (bf16) runs on GPU 1 (Fake A100-40GB)");
    assert!(facts[1].starts_with("GPU 1 (Fake A100-40GB): weights "), "{facts:?}");
    let words = "6 sequences of 64 tokens, 96 bytes a token";
    assert!(facts[1].contains(words), "{facts:?}");
    let count = 6 * (1 + smaller().len());
    assert_eq!(facts[2], format!("compiling the kernels of {count} step sizes, which later starts find in a cache"));
    assert_eq!(executor.limits().slots, 6);
    run_steps(&mut *executor, 400);
    let refused = heard.lock().unwrap().iter().filter(|fact| fact.contains("without CUDA graphs")).count();
    assert_eq!(refused, usize::from(std::env::var_os("FAKE_NO_CAPTURE").is_some()), "said once");

    // On another thread, with fewer slots, and with the kernel cache of the first run.
    drop(executor);
    assert!(!package.path().join("kernels").exists(), "kernels are code: none is read from a package");
    assert_eq!(std::fs::read_dir(folder().join("cache/aotron/kernels")).unwrap().count(), 2 + 2 * smaller().len());
    let gpu = GpuOptions { slots: Some(3), no_graphs: true, ..GpuOptions::default() };
    let mut executor = TensorRtExecutor::open(&package, &package.manifest().plans[0], &gpu).unwrap();
    assert_eq!((executor.limits().slots, executor.gpu().index), (3, 1));
    std::thread::spawn(move || run_steps(&mut executor, 100)).join().unwrap();
}

#[test]
fn no_request_waits_for_kernels() {
    let text = run("on_stand_ins_kernels_are_compiled", &[]);
    let between = |from: &str, to: &str| {
        let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("no {from}: {text}"));
        rest.split_once(to).unwrap_or_else(|| panic!("no {to}: {text}")).0.to_owned()
    };
    let waits = "a run waits for kernels";
    assert_eq!(between("opening", "opened").matches(waits).count(), 12, "{text}");
    let serving = between("opened", "again");
    assert_eq!(serving.matches(waits).count(), 0, "{serving}");
    // At the end of a row, where a few tokens are left.
    assert!(serving.contains("kernels are compiled aside for 1 x 4"), "{serving}");
    assert_eq!(between("again", "lazily").matches(waits).count(), 8, "decode runs alone: {text}");
    let lazily = between("lazily", "eagerly");
    let aside = "kernels are compiled aside for 1 x 8";
    assert!(lazily.contains(waits) && lazily.contains(aside), "{lazily}");
    let eagerly = text.split_once("eagerly").unwrap().1;
    assert!(eagerly.contains(waits) && !eagerly.contains("kernels are compiled aside"), "{eagerly}");
}

#[test]
#[ignore = "run by no_request_waits_for_kernels"]
fn on_stand_ins_kernels_are_compiled() {
    let package = package("whole", &plan_text(false));
    let plan = &package.manifest().plans[0];
    let open = |kernels| {
        let events = Arc::new(Mutex::new(Vec::new()));
        let copy = events.clone();
        let report = GpuReport::to(move |event: &GpuEvent<'_>| {
            if let GpuEvent::Compiling { done, total } = event {
                copy.lock().unwrap().push((*done, *total));
            }
        });
        let gpu = GpuOptions { kernels, report, ..GpuOptions::default() };
        let executor = TensorRtExecutor::open(&package, plan, &gpu).unwrap();
        let events = events.lock().unwrap().clone();
        (executor, events)
    };
    let up_to = |total: usize| (0..=total).map(|done| (done, total)).collect::<Vec<_>>();
    eprintln!("opening");
    let (mut executor, events) = open(KernelCompilation::AtOpening);
    // In each of two classes: four batch sizes, and one size of a prompt's first chunk and of later ones.
    assert_eq!(events, up_to(12));
    eprintln!("opened");
    run_steps(&mut executor, 300);
    drop(executor);
    eprintln!("again");
    let (executor, events) = open(KernelCompilation::AtOpening);
    assert_eq!(events, up_to(8), "what the kernel cache has is only captured");
    drop(executor);
    std::fs::remove_dir_all(folder().join("cache")).unwrap();
    for (kernels, marker) in [(KernelCompilation::OnFirstUse, "lazily"), (KernelCompilation::BeforeUse, "eagerly")] {
        eprintln!("{marker}");
        let (mut executor, events) = open(kernels);
        assert_eq!(events, []);
        run_steps(&mut executor, 100);
    }
}

/// In memory for two long sequences, six short ones run; they grow in turn, wait for memory, and give what the sequences
/// alone give.
#[test]
fn sequences_share_one_budget_and_move_as_they_grow() {
    run("on_stand_ins_sequences_share", &[]);
}

#[test]
#[ignore = "run by sequences_share_one_budget_and_move_as_they_grow"]
fn on_stand_ins_sequences_share() {
    let package = package("whole", &plan_text(false));
    let plan = &package.manifest().plans[0];
    let gpu = GpuOptions { slots: Some(4), ..GpuOptions::default() };
    let mut executor = TensorRtExecutor::open(&package, plan, &gpu).unwrap();
    assert_eq!(executor.kv_block(), None, "no prefix cache outside of the slots");
    let limits = executor.limits().clone();
    let token = |slot: usize, position: usize| ((slot * 37 + position * 11) % VOCAB) as u32;
    let step = |executor: &mut TensorRtExecutor, slots: &[usize], past_tokens: usize| -> aotron::Result<()> {
        let next: Vec<NextToken> =
            slots.iter().map(|slot| NextToken { slot: *slot, past_tokens, token: token(*slot, past_tokens) }).collect();
        let logits = executor.forward(&Step::decode(&limits, &next)?)?;
        for (row, slot) in slots.iter().enumerate() {
            let sequence: Vec<u32> = (0..=past_tokens).map(|position| token(*slot, position)).collect();
            let wanted = expected(&sequence);
            let best = (0..VOCAB as u32).max_by(|x, y| wanted[*x as usize].total_cmp(&wanted[*y as usize])).unwrap();
            assert_eq!(logits.top(row).unwrap().ids[0], best, "slot {slot} at {past_tokens}");
        }
        Ok(())
    };
    // Reserved for all they may become, four sequences fit, and all of them reach their end together.
    assert!((0..4).all(|slot| executor.reserve(slot, 64)));
    for past_tokens in 0..64 {
        step(&mut executor, &[2, 0, 3, 1], past_tokens).unwrap();
        let class = executor.class_tokens(2);
        assert_eq!(class, Some(if past_tokens < 31 { 32 } else { 64 }), "after token {past_tokens}");
    }
    // Nothing is free; then what was released makes room, and its contents are gone.
    assert_eq!(executor.retained_tokens(1), 64);
    executor.release(1);
    assert_eq!(executor.retained_tokens(1), 64);
    assert!(executor.reserve(1, 31));
    assert_eq!(executor.retained_tokens(1), 64);
    for past_tokens in 0..31 {
        step(&mut executor, &[1], past_tokens).unwrap();
    }
    assert_eq!(executor.class_tokens(1), Some(32));
    // A step on tokens that are not there is refused, and leaves everything as it was.
    let error = step(&mut executor, &[1], 40).unwrap_err().to_string();
    assert!(error.contains("slot 1 holds 31 tokens, but the step builds on 40 of it"), "{error}");
    step(&mut executor, &[1, 3], 31).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_gpu_that_fails_says_so_from_then_on() {
    run("on_stand_ins_a_gpu_fails", &[("FAKE_FAIL_AT", "4")]);
}

#[test]
#[ignore = "run by a_gpu_that_fails_says_so_from_then_on"]
fn on_stand_ins_a_gpu_fails() {
    let package = package("whole", &plan_text(false));
    let plan = &package.manifest().plans[0];
    let gpu = GpuOptions { kernels: KernelCompilation::OnFirstUse, ..GpuOptions::default() };
    let mut executor = TensorRtExecutor::open(&package, plan, &gpu).unwrap();
    let limits = executor.limits().clone();
    let decode = |past_tokens| Step::decode(&limits, &[NextToken { slot: 0, past_tokens, token: 1 }]).unwrap();
    for past_tokens in 0..3 {
        assert!(executor.forward(&decode(past_tokens)).is_ok());
    }
    let error = executor.forward(&decode(3)).unwrap_err().to_string();
    assert!(
        error.starts_with("GPU: GPU 1 (Fake A100-40GB) has failed; restart aotron to use it again: cannot "),
        "{error}"
    );
    assert!(error.contains("an illegal memory access was encountered (FAKE_ILLEGAL_ADDRESS)"), "{error}");
    assert_eq!(executor.forward(&decode(3)).unwrap_err().to_string(), error);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_allocated() {
    run("on_stand_ins_plans_are_refused", &[]);
}

#[test]
#[ignore = "run by what_does_not_fit_is_refused_before_anything_is_allocated"]
fn on_stand_ins_plans_are_refused() {
    let gpus = devices().unwrap();
    assert_eq!(gpus.len(), 2);
    assert_eq!((gpus[1].compute_capability, gpus[1].memory_bytes), (80, 42_400_000_000));

    let whole = package("whole", &plan_text(false));
    let refused = |package: &Package, plan: &PlanInfo, options: &GpuOptions| {
        TensorRtExecutor::open(package, plan, options).err().expect("must be refused").to_string()
    };
    let plan = &whole.manifest().plans[0];
    let on = |device| GpuOptions { device: Some(device), ..GpuOptions::default() };
    let error = refused(&whole, plan, &on(0));
    assert!(error.contains("it was built for SM 8.0 (A100), but GPU 0 is Fake L40, SM 8.9 (L4, L40)"), "{error}");
    assert!(refused(&whole, plan, &on(2)).contains("there is no GPU 2, only 0 to 1"));
    let error = refused(&whole, plan, &GpuOptions { slots: Some(7), ..GpuOptions::default() });
    assert!(error.contains("7 slots, but this plan was built for 1 to 6"), "{error}");

    let mut old = plan.clone();
    old.tensorrt.as_mut().unwrap().bindings.retain(|binding| binding.role != BindingRole::LogitSums);
    let error = refused(&whole, &old, &GpuOptions::default());
    assert!(error.contains("compiled before plans returned sums of logits") && error.contains("--finish"), "{error}");
    let mut prepared = plan.clone();
    prepared.tensorrt.as_mut().unwrap().compiled = None;
    let error = refused(&whole, &prepared, &GpuOptions::default());
    assert!(error.contains("it was prepared only, not compiled for SM 8.0 (A100)"), "{error}");
    assert!(error.contains("--finish"), "{error}");
    let mut large = plan.clone();
    for binding in &mut large.tensorrt.as_mut().unwrap().bindings {
        if binding.name == "weight.0" {
            binding.shape = vec![Extent::Fixed(30_000_000_000)];
        }
    }
    let changed = plan_text(false).replace("weight.0 bf16 - 1 300", "weight.0 bf16 - 1 30000000000");
    let other = package("large", &changed);
    large.tensorrt.as_mut().unwrap().compiled.as_mut().unwrap().context_plan = None;
    large.tensorrt.as_mut().unwrap().smaller_classes.clear();
    let error = refused(&other, &large, &GpuOptions::default());
    assert!(error.contains("not even one sequence fits: weights 60.0 GB"), "{error}");

    let mut without = plan.clone();
    without.tensorrt.as_mut().unwrap().smaller_classes[0].plan = None;
    let error = refused(&whole, &without, &GpuOptions::default());
    assert!(error.contains("it has no plan for 32 tokens") && error.contains("--finish"), "{error}");
    without.tensorrt.as_mut().unwrap().smaller_classes[0].capacity_tokens = 64;
    let error = refused(&whole, &without, &GpuOptions::default());
    assert!(error.contains("its capacity classes are not in ascending order, or are too many: [64, 64]"), "{error}");

    let old = package("old", &format!("old {}", plan_text(false)));
    let error = refused(&old, plan, &GpuOptions::default());
    assert!(error.contains("it was compiled by another version of TensorRT for RTX"), "{error}");
    let other =
        package("other", &plan_text(false).replace("input token_ids token_ids i32", "input token_ids token_ids bf16"));
    let error = refused(&other, plan, &GpuOptions::default());
    assert!(
        error.contains("plans/a100.plan is not the plan that the manifest describes: its input token_ids: bf16"),
        "{error}"
    );
    let other = package("other-sizes", &plan_text(false).replace("profile 6 1 6", "profile 5 1 5"));
    let error = refused(&other, plan, &GpuOptions::default());
    assert!(error.contains("in the manifest [6, 1]"), "{error}");
    std::fs::write(whole.file_path("plans/a100.plan"), plan_text(false).replace("weight.0", "weight.X")).unwrap();
    let error = refused(&whole, plan, &GpuOptions::default());
    assert!(error.contains("does not match its digest"), "{error}");
}
