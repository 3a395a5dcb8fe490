use aotron::backend::tensorrt::lower::*;
use aotron::backend::tensorrt::*;
use aotron::checkpoint::{Checkpoint, ModelConfig};
use aotron::compile::{Calibration, Precision, optimized_graph};
use aotron::tensor::DType;
use std::sync::{Arc, Mutex};
#[derive(Default)]
struct R(Mutex<Vec<String>>);
impl Monitor for R {
    fn log(&self, _: Severity, l: &str) {
        self.0.lock().unwrap().push(l.to_owned())
    }
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let precision = Precision::ALL.into_iter().find(|p| p.to_string() == a[2]).unwrap();
    let sm: u16 = a[3].parse().unwrap();
    let attends = if a[4] == "cache" { Attends::Cache } else { Attends::Chunk };
    let mut config = Checkpoint::open("tests/data/tiny-chat".as_ref()).unwrap().config().clone();
    if a[1] != "tiny" {
        config = ModelConfig {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 16384,
            num_layers: a[1].parse().unwrap(),
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
    }
    let s = config.max_position_embeddings;
    let sizes = Sizes {
        max_sequence_tokens: s,
        decode_sequences: 8,
        prefill_sequences: 1,
        prefill_tokens: 512.min(s),
        prefill_logits_rows: 32,
        top_tokens: 64,
    };
    let cal = Calibration::uniform(0.05);
    let (graph, _) = optimized_graph(&config, precision, s, Some(&cal)).unwrap();
    let lib = Library::find(Kind::Rtx).unwrap();
    let r = Arc::new(R::default());
    let mut l = lower(&graph, lib.network(r.clone()).unwrap(), attends, &sizes, &Constants::Arbitrary).unwrap();
    let t = std::time::Instant::now();
    let plan = l.network.build(&BuildOptions {
        compute_capability: Some(sm),
        list_kernels: true,
        profiles: l.profiles.clone(),
    });
    println!(
        "{:?} {:.1}s",
        plan.as_ref().map(|p| p.bytes().len()).map_err(|e| e.to_string()),
        t.elapsed().as_secs_f64()
    );
    let lines = r.0.lock().unwrap();
    let mut n = [0, 0];
    for line in lines.iter().flat_map(|t| t.lines()) {
        let Some((name, rest)) = line.strip_prefix("Name: ").and_then(|l| l.split_once(", LayerType: ")) else {
            continue;
        };
        let (kind, rest) = rest.split_once(", ").unwrap();
        if ["signal", "wait", "shape_call"].contains(&kind) {
            continue;
        }
        let p = usize::from(name.contains("_myl1_"));
        n[p] += 1;
        let want = if attends == Attends::Cache { 1 } else { 0 };
        if p == want && n[p] < 24 {
            let mut short = String::new();
            for part in rest.split("Name: ").skip(1) {
                let nm = part.split(',').next().unwrap();
                let d = part.split("Dimensions: ").nth(1).and_then(|d| d.split(']').next()).unwrap_or("");
                let ty = part
                    .split("Datatype: ")
                    .nth(1)
                    .and_then(|d| d.split(|c: char| !c.is_alphanumeric()).next())
                    .unwrap_or("");
                short += &format!(" {}{}]{}{}", nm, d, ty, if part.contains("Outputs:") { " ->" } else { "" });
            }
            println!("{kind:8} {} |{}", &name[..name.len().min(70)], short);
        }
    }
    println!("profile kernels {n:?} layers {}", config.num_layers);
}
