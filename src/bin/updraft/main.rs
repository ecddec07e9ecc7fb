//! The `updraft` command: SkyPilot's verbs on machines you have.
//!
//! The library does the work; this program reads its command line and talks.

mod arguments;
mod completions;
mod jobs;
mod launch;
mod progress;
mod screen;
mod serve;
mod show;
mod world;

use std::process::ExitCode;

use arguments::{Command, USAGE};
use screen::Screen;

/// A job that failed, as SkyPilot's command has it.
const JOB_FAILED: u8 = 100;
/// A job that was cancelled.
const JOB_CANCELLED: u8 = 103;
/// A command line that cannot be understood.
const USAGE_ERROR: u8 = 2;

/// What a verb ends with: an error, or the code for scripts.
type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let screen = Screen::new();
    let command = match Command::read(std::env::args_os()) {
        Ok(command) => command,
        Err(error) => {
            screen.error(&format!("{error}; `updraft --help` shows what there is"));
            return ExitCode::from(USAGE_ERROR);
        }
    };
    // The agent is its own world: no runtime, no state of the client.
    if let Command::Agent(words) = &command {
        return match updraft::provision::agent::command(
            words,
            &mut std::io::stdout(),
            &mut std::io::stderr(),
        ) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => screen.fail(&error),
        };
    }
    // Nobody has set another: this is the first thing the program does.
    let _ = tracing::subscriber::set_global_default(progress::Progress);
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return screen.fail(&error),
    };
    match runtime.block_on(run(command, &screen)) {
        Ok(code) => code,
        Err(error) => screen.fail(error.as_ref()),
    }
}

async fn run(command: Command, screen: &Screen) -> Outcome {
    match command {
        Command::Help => screen.say(USAGE),
        Command::Version => screen.say(concat!("updraft ", env!("CARGO_PKG_VERSION"))),
        Command::Completions(shell) => screen.say(&completions::script(&shell)?),
        Command::Launch(options) => return launch::launch(*options, screen).await,
        Command::Exec(options) => return launch::exec(*options, screen).await,
        Command::Queue { cluster, json } => jobs::queue(&cluster, json, screen).await?,
        Command::Logs {
            cluster,
            job,
            follow,
            json,
        } => return jobs::logs(&cluster, job, follow, &screen.for_lines(json)).await,
        Command::Cancel { cluster, job, json } => {
            jobs::cancel(&cluster, job, json, screen).await?;
        }
        Command::Autostop {
            cluster,
            lease,
            json,
        } => jobs::autostop(&cluster, lease, json, screen).await?,
        Command::Status { refresh, json } => show::status(refresh, json, screen).await?,
        Command::Stop(clusters, json) => show::stop(&clusters, json, screen).await?,
        Command::Start(clusters, json) => show::start(&clusters, json, screen).await?,
        Command::Down {
            clusters,
            purge,
            yes,
            json,
        } => show::down(&clusters, purge, yes, json, screen).await?,
        Command::Check { json } => return show::check(json, screen).await,
        Command::Gpus { json } => show::gpus(json, screen).await?,
        Command::CostReport { json } => show::cost_report(json, screen)?,
        Command::Gc { json } => show::gc(json, screen).await?,
        Command::ServeUp(options) => return serve::up(*options, screen).await,
        Command::ServeUpdate(options) => return serve::update(*options, screen).await,
        Command::ServeStatus { json } => serve::status(json, screen)?,
        Command::ServeDown { names, yes, json } => {
            serve::down(&names, yes, json, screen).await?;
        }
        Command::ServeRun(name) => serve::run(&name).await?,
        Command::Agent(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}
