//! Builds binaries with cargo and finds their paths.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A binary: the name of its target, and its path.
#[derive(Debug, Clone)]
pub(crate) struct Binary {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// Returns the workspace's folder.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Runs `program`, which is cargo or a script that calls cargo. Returns the binaries of targets of this kind.
pub(crate) fn binaries(program: &str, arguments: &[&str], kind: &str) -> Result<Vec<Binary>, String> {
    println!("building: {program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(workspace())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} {} failed", arguments.join(" ")));
    }
    let mut binaries: Vec<_> =
        String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| artifact(line, kind)).collect();
    binaries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(binaries)
}

/// Parses one of cargo's messages. Returns `None` if it does not name a binary of this kind.
fn artifact(line: &str, kind: &str) -> Option<Binary> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let target = message.get("target")?;
    if target.get("kind")?.get(0)? != kind {
        return None;
    }
    let path = message.get("executable")?.as_str()?.into();
    Some(Binary { name: target.get("name")?.as_str()?.into(), path })
}
