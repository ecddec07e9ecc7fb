//! Compiles the kernels: for a GPU by `nvcc` (feature `cuda`), for the CPU by the C++ compiler (`cuda-emulator`).
//!
//! Environment, for `cuda`:
//! - `CUDA_COMPUTE_CAP`: the oldest capability to run on, as in `80`; otherwise that of the first GPU `nvidia-smi`
//!   lists, otherwise 80. Newer GPUs compile the kernels again when they load them.
//! - `NVCC`, `CUDA_HOME`, `CUDA_PATH`: where `nvcc` is; otherwise it is looked for in `PATH` and `/usr/local/cuda`.
//! - `UPDRAFT_SKIP_NVCC`: compile no kernels, for lints and documentation where there is no `nvcc`.

use std::path::PathBuf;

const SOURCES: &str = "src/cuda";

fn main() {
    println!("cargo:rerun-if-changed={SOURCES}");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        nvcc::compile();
    }
    #[cfg(feature = "cuda-emulator")]
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag_if_supported("-Wno-unknown-pragmas")
        .flag_if_supported("-Wno-unused-function")
        .flag_if_supported("-Wno-clobbered")
        .flag_if_supported("-U_FORTIFY_SOURCE") // it would refuse jumps from one stack to another
        .file(std::path::Path::new(SOURCES).join("emulator.cpp"))
        .compile("updraft_cuda_emulator");
}

/// The `.cu` files, in the order of their names.
fn kernels() -> Vec<PathBuf> {
    let files = std::fs::read_dir(SOURCES).expect("the folder of the kernels");
    let paths = files.map(|file| file.expect("a file of the folder").path());
    let mut kernels: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    kernels.sort();
    kernels
}

mod nvcc {
    use std::fmt::Write as _;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    pub(super) fn compile() {
        for name in [
            "CUDA_COMPUTE_CAP",
            "NVCC",
            "CUDA_HOME",
            "CUDA_PATH",
            "UPDRAFT_SKIP_NVCC",
            "DOCS_RS",
        ] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
        let capability = capability();
        let mut list = format!(
            "pub(super) const CAPABILITY: u32 = {capability};\n\
             pub(super) const IMAGES: &[(&str, &[u8])] = &[\n"
        );
        let skipped = ["UPDRAFT_SKIP_NVCC", "DOCS_RS"];
        if !skipped.iter().any(|name| std::env::var_os(name).is_some()) {
            let nvcc = find();
            for source in super::kernels() {
                let name = source.file_stem().expect("a file's name").to_string_lossy();
                let image = out.join(format!("{name}.fatbin"));
                run(&nvcc, &source, &image, capability);
                writeln!(list, "({name:?}, include_bytes!({image:?})),").expect("to a string");
            }
        }
        list.push_str("];\n");
        std::fs::write(out.join("kernels.rs"), list).expect("cargo's own folder");
    }

    fn run(nvcc: &Path, source: &Path, image: &Path, capability: u32) {
        let status = Command::new(nvcc)
            .args(["-std=c++17", "-O3", "-fatbin", "-gencode"])
            .arg(format!(
                "arch=compute_{capability},code=[sm_{capability},compute_{capability}]"
            ))
            .arg("-o")
            .args([image, source])
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => panic!(
                "{} failed on {}: {status}",
                nvcc.display(),
                source.display()
            ),
            Err(error) => panic!("{} does not start: {error}", nvcc.display()),
        }
    }

    fn capability() -> u32 {
        if let Ok(chosen) = std::env::var("CUDA_COMPUTE_CAP") {
            let parsed = chosen.replace('.', "").parse();
            return parsed.unwrap_or_else(|_| {
                panic!("CUDA_COMPUTE_CAP is {chosen:?}, not a capability such as 80 or 90")
            });
        }
        let listed = Command::new("nvidia-smi")
            .args(["--query-gpu=compute_cap", "--format=csv,noheader"])
            .output();
        let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let first = listed.ok().and_then(|all| {
            let line = all.lines().next()?;
            line.trim().replace('.', "").parse().ok()
        });
        first.unwrap_or(80)
    }

    fn find() -> PathBuf {
        if let Some(nvcc) = std::env::var_os("NVCC") {
            return nvcc.into();
        }
        let homes = ["CUDA_HOME", "CUDA_PATH"]
            .into_iter()
            .filter_map(std::env::var_os);
        let folders = homes.map(|home| Path::new(&home).join("bin"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = folders
            .chain(std::env::split_paths(&path))
            .chain([PathBuf::from("/usr/local/cuda/bin")]);
        let mut programs = folders.map(|folder| folder.join("nvcc"));
        programs.find(|program| program.is_file()).unwrap_or_else(|| {
            panic!(
                "no nvcc: install the CUDA toolkit, or make one without root by `tools/cuda-toolkit DIR` \
                 and put DIR/bin on PATH"
            )
        })
    }
}
