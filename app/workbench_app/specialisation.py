from workbench import questions
from workbench_app import panel, view

view.need_trace()
for section in questions.sections(view.trace(), view.trace().sequences())[:2]:
    for one in section["questions"]:
        panel.analysis(one, key=section["id"])
