//! Completion of verbs and of clusters' names, for shells.

const BASH: &str = r#"_updraft() {
  local word=${COMP_WORDS[COMP_CWORD]} verb=${COMP_WORDS[1]}
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "launch exec queue logs cancel status stop start down autostop serve check gpus cost-report gc completions" -- "$word"))
  elif [ "$verb" = serve ] && [ "$COMP_CWORD" -eq 2 ]; then
    COMPREPLY=($(compgen -W "up update status down" -- "$word"))
  elif [[ " exec queue logs cancel stop start down autostop " == *" $verb "* ]] && [ "$COMP_CWORD" -eq 2 ]; then
    COMPREPLY=($(compgen -W "$(updraft status 2>/dev/null | tail -n +2 | cut -d' ' -f1)" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}
complete -o filenames -F _updraft updraft
"#;

const FISH: &str = r#"set -l verbs launch exec queue logs cancel status stop start down autostop serve check gpus cost-report gc completions
complete -c updraft -n "not __fish_seen_subcommand_from $verbs" -f -a "$verbs"
complete -c updraft -n "__fish_seen_subcommand_from serve" -f -a "up update status down"
complete -c updraft -n "__fish_seen_subcommand_from exec queue logs cancel stop start down autostop" -a "(updraft status 2>/dev/null | tail -n +2 | string split -f1 ' ')"
"#;

pub(crate) fn script(shell: &str) -> Result<String, String> {
    match shell {
        "bash" => Ok(BASH.to_owned()),
        // zsh reads bash's words once it is asked to.
        "zsh" => Ok(format!(
            "autoload -U +X bashcompinit && bashcompinit\n{BASH}"
        )),
        "fish" => Ok(FISH.to_owned()),
        other => Err(format!(
            "no completions for `{other}`; there are bash, zsh and fish"
        )),
    }
}
