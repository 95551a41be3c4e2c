from bdprune.verdict.judgement import judge
