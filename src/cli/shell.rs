//! `aotron completions` and `aotron man`: shell completions and manual pages, from the program's own definition.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::Args;

/// The shell to complete for.
#[derive(Debug, clap::Args)]
pub struct CompletionFlags {
    /// Whose completions are printed
    #[arg(value_enum)]
    shell: Shell,
}

/// Where the manual goes.
#[derive(Debug, clap::Args)]
pub struct ManFlags {
    /// Write aotron.1 and a page for each command into this folder, rather than print aotron.1
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
}

pub fn completions(flags: &CompletionFlags) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut Args::command(), "aotron", &mut script);
    Ok(std::io::stdout().lock().write_all(&script)?)
}

pub fn man(flags: &ManFlags) -> anyhow::Result<()> {
    if let Some(folder) = &flags.output {
        fs::create_dir_all(folder).map_err(aotron::Error::io("make the folder", folder))?;
        return Ok(clap_mangen::generate_to(Args::command(), folder).map_err(aotron::Error::io("write to", folder))?);
    }
    let mut page = Vec::new();
    Man::new(Args::command()).render(&mut page)?;
    Ok(std::io::stdout().lock().write_all(&page)?)
}
