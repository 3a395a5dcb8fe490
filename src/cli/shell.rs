//! `aotron completions` and `aotron man`: shell completions and manual pages, generated from the program's own
//! definition.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::Args;

/// Flags of `aotron completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionFlags {
    /// Shell to print completions for
    #[arg(value_enum)]
    shell: Shell,
}

/// Flags of `aotron man`.
#[derive(Debug, clap::Args)]
pub struct ManFlags {
    /// Write aotron.1 and a page for each command to FOLDER instead of printing aotron.1
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
}

pub fn completions(flags: &CompletionFlags) -> anyhow::Result<()> {
    Ok(super::term::stdout().write_all(&script(flags.shell))?)
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "aotron", &mut script);
    script
}

pub fn man(flags: &ManFlags) -> anyhow::Result<()> {
    if let Some(folder) = &flags.output {
        fs::create_dir_all(folder).map_err(aotron::Error::io("make the folder", folder))?;
        return Ok(clap_mangen::generate_to(Args::command(), folder).map_err(aotron::Error::io("write to", folder))?);
    }
    let mut page = Vec::new();
    Man::new(Args::command()).render(&mut page)?;
    Ok(super::term::stdout().write_all(&page)?)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_command_is_completed_and_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        man(&ManFlags { output: Some(folder.path().join("man1")) }).unwrap();
        let page = |name: &str| fs::read_to_string(folder.path().join("man1").join(format!("{name}.1"))).unwrap();
        assert!(page("aotron").starts_with(".ie") && page("aotron").contains(".TH aotron 1"));
        for command in Args::command().get_subcommands() {
            let name = command.get_name();
            assert!(page(&format!("aotron-{name}")).contains(&format!(".TH aotron-{name} 1")), "{name}");
            for shell in Shell::value_variants() {
                assert!(String::from_utf8(script(*shell)).unwrap().contains(name), "{shell}: {name}");
            }
        }
    }
}
